"""Commands to start with: presets, memory estimates, a check of the installation, a demonstration."""

from dataclasses import dataclass
from pathlib import Path

from lvssl.commands.arguments import asks_for_help, parse, preset_in


def presets(arguments: list[str]) -> None:
    import json

    from lvssl.settings.presets import difference_of, listing, settings_of

    if asks_for_help(arguments):
        print("usage: lvssl presets [NAME [NAME]]\n")
        print("List the presets; with one NAME, print all its settings; with two, print how they differ.")
    elif len(arguments) == 2:
        print(difference_of(*arguments))
    elif arguments:
        for name in arguments:
            print(json.dumps(settings_of(name), indent=2))
    else:
        print(listing())
        print("\n`lvssl presets NAME` prints all settings of one, `lvssl presets A B` how two differ.")


def plan(arguments: list[str]) -> None:
    from lvssl.settings.start import PlanSettings, of_preset

    name = preset_in(arguments)
    settings = parse(PlanSettings, arguments, "plan", of_preset(name) if name else None)

    from lvssl.plan import plan as table

    print(table(settings))


def doctor(arguments: list[str]) -> int:
    import tyro

    @dataclass(frozen=True)
    class Doctor:
        """Check the installation and print a command for everything that is missing; or check a run for
        posterior collapse, saturation and a constant scale, with exit status 1 if any is found."""

        run: tyro.conf.Positional[Path | None] = None
        """Folder of a run. If omitted, the installation is checked."""

    run = parse(Doctor, arguments, "doctor").run
    if run is None:
        from lvssl.commands.doctor import main

        return main()
    from lvssl.training.health import examine

    return examine(run)


def demo(arguments: list[str]) -> None:
    from lvssl.settings.start import DemoSettings

    settings = parse(DemoSettings, arguments, "demo")

    from lvssl.commands.demo import demo as run

    run(settings)
