"""`lvssl pretrain`."""

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lvssl.commands.arguments import asks_for_help, parse


def start_from(arguments: list[str]) -> tuple[Any, str]:
    """Return the settings that the options change, and what they were chosen for, "" if they weren't."""
    from lvssl.settings.pretrain import PretrainSettings, preset
    from pipelines.datasets.parts import are_there

    usage = "lvssl pretrain [-h] [OPTIONS]"
    first = argparse.ArgumentParser("lvssl pretrain", usage, add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--out", type=Path)
    first.add_argument("--resume", action="store_true")
    first.add_argument("--data", type=Path, default=PretrainSettings.data)
    first.add_argument("--source", default="auto")
    first.add_argument("--device", default="auto")
    first.add_argument("--backbone", default="")
    first.add_argument("--epochs", default="")
    known, others = first.parse_known_args(arguments)
    if known.preset is not None:
        return preset(known.preset), ""
    if known.resume and known.out and (known.out / "config.json").exists():
        from lvssl.runs.run import read_config

        return replace(read_config(known.out)[0], out=known.out), ""
    if not asks_for_help(others) and are_there(known.data):
        from lvssl.commands.suggest import suggest

        epochs = int(known.epochs) if known.epochs.isdecimal() else 0
        return suggest(known.data, known.source, known.device, known.backbone, epochs)
    return PretrainSettings(), ""


def pretrain(arguments: list[str]) -> None:
    from lvssl.settings.fields import shell_line
    from lvssl.settings.pretrain import PRESETS, PretrainSettings
    from pipelines.datasets.parts import are_there
    from pipelines.decode import DamagedSample
    from pipelines.errors import InputError

    settings, what = start_from(arguments)

    @dataclass(frozen=True)
    class Pretrain:
        settings: PretrainSettings = field(default_factory=lambda: settings)
        resume: bool = False
        """Resume the run in --out from its newest checkpoint. Its settings need not be repeated."""

    about = f"{PretrainSettings.__doc__} Presets: {', '.join(PRESETS)}. Options override --preset."
    about += " Without --preset, preset, resolution, batch size, epochs and precision are chosen to suit"
    about += " the images, the device and --backbone; transformers are trained with an AdamW recipe."
    chosen = parse(Pretrain, arguments, "pretrain", about=about)
    out, data = chosen.settings.out, chosen.settings.data
    if chosen.resume and not (out / "config.json").exists() and not are_there(data):
        raise InputError(
            f"{out}: no run to resume (no {out / 'config.json'}), and no data to start one (no {data}): "
            "check --out and --data"
        )

    from lvssl.plan import require_memory
    from lvssl.runs.run import read_config
    from lvssl.training.distributed import world_of
    from lvssl.training.pretrain import pretrain as run

    chosen.settings.validate()
    if what and world_of().first:
        from lvssl.commands.suggest import in_words

        print(in_words(chosen.settings, what), file=sys.stderr, flush=True)
    try:
        run(chosen.settings, chosen.resume, lambda: require_memory(chosen.settings, world_of().size))
    except DamagedSample as error:
        resumed = "--resume " if (out / "config.json").exists() else ""
        raise InputError(f"{error}; pass {resumed}--on-error skip to leave out such images") from error
    if not world_of().first:
        return
    following = shell_line("lvssl", "encode", out, "--images", data)
    if read_config(out)[1] > 1:  # there are labels
        following += f", or with labelled test images {shell_line('lvssl', 'evaluate', out)} --test TEST"
    print(f"{out}: done; next: {following}")
