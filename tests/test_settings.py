"""What a field says of itself gives identity, difference and the command line, alike for every command."""

import shlex
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import pytest

from lvssl.commands.arguments import parse
from lvssl.settings.fields import (
    RUNTIME,
    all_settings,
    beyond_defaults,
    difference,
    from_dict,
    identity,
    runtime,
    to_dict,
)
from lvssl.settings.measure import AnalyseSettings, CompressionSettings, EvaluateSettings, StudySettings
from lvssl.settings.presets import command
from lvssl.settings.pretrain import PRESETS, LatentSettings, OptimiserSettings, PretrainSettings, preset
from lvssl.settings.stages import FinetuneSettings, KnnSettings, LinearSettings, start_from
from lvssl.training.pretrain import pretrain
from pipelines.errors import InputError

RUN = Path("runs/a run")
CALLS = {
    "pretrain": replace(  # the preset of the defaults: without one, the command would choose
        preset("folder-r50"), data=Path("it's.beton"), latent=LatentSettings(beta=0.5, init_scale_start=1.0)
    ),
    "pretrain digits": replace(
        preset("digits"), out=RUN, engine=replace(preset("digits").engine, compile="off")
    ),
    "evaluate": EvaluateSettings(RUN, test=Path("t.beton"), control=Path("c"), on_error="skip", workers=7),
    "analyse": AnalyseSettings(RUN, alone=True, others=(Path("a"), Path("b")), ood=(Path("c"),), samples=3),
    "compression": CompressionSettings(RUN, bits=(8, 24), top_n=50, seed=3),
    "study": StudySettings(Path("t"), Path("u"), preset="digits", arms=("none", "a:dim=4"), seeds=(4,)),
    "linear": LinearSettings(RUN, probe="sgd", precision="bf16", device="cpu"),
    "linear imagenet-linear": replace(start_from(LinearSettings, "imagenet-linear"), run=RUN, batch_size=256),
    "knn": KnnSettings(RUN, target="angle", k=7),
    "finetune": FinetuneSettings(RUN, label_fraction=0.1, lr=(0.3,), weight_decay=(0.0,), out=Path("x.json")),
}


def retyped(words: list[str], kind: type) -> object:
    """The settings that a command gives, as the command line makes them."""
    start = None
    if "--preset" in words and kind is not StudySettings:
        chosen = words[words.index("--preset") + 1]
        start = preset(chosen) if chosen in PRESETS else start_from(kind, chosen)
    return parse(kind, words[2:], words[1], start)


@pytest.mark.parametrize("name", CALLS)
def test_the_command_gives_the_settings_that_it_was_made_from(name):
    settings = CALLS[name]
    words = shlex.split(command(name.partition(" ")[0], settings))
    assert words[:2] == ["lvssl", name.partition(" ")[0]]
    assert retyped(words, type(settings)) == settings


def other(value: object) -> object:
    """A value that differs from a setting's; for those that take none by default, what they may be."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, tuple):
        return tuple(map(other, value)) or (Path("it's another"),)
    return Path("a file") if isinstance(value, Path) else "x y"


STARTS = {
    **{f"pretrain {name}": settings for name, settings in PRESETS.items()},
    **{name: settings for name, settings in CALLS.items() if " " not in name},
    "linear imagenet-linear": CALLS["linear imagenet-linear"],
    "finetune imagenet-finetune": replace(start_from(FinetuneSettings, "imagenet-finetune"), run=RUN),
}


@pytest.mark.parametrize("name", STARTS)
def test_no_setting_is_dropped_from_the_command(name):
    """Each setting changed, all in one: on its own each would take a second."""
    start = STARTS[name]

    def changed(settings, only=None):
        found = {}
        for each in fields(settings):
            value = getattr(settings, each.name)
            if is_dataclass(value):
                found[each.name] = changed(value)
            elif value is not None and each.name != "preset" and not each.metadata.get("per_call"):
                found[each.name] = other(value)
        return replace(settings, **found)

    settings = changed(start)
    if isinstance(start, StudySettings):
        settings = replace(settings, preset="digits", ood=(Path("a b"),))
    assert retyped(shlex.split(command(name.partition(" ")[0], settings)), type(settings)) == settings


def test_what_is_as_by_default_and_what_belongs_to_a_call_is_not_told():
    assert command("knn", KnnSettings(Path("r"), overwrite=True)) == "lvssl knn r"
    assert command("pretrain", preset("digits")) == "lvssl pretrain --preset digits"
    gone = replace(PretrainSettings(epochs=7), preset="of another version")
    assert command("pretrain", gone) == "lvssl pretrain --preset folder-r50 --epochs 7"
    assert command(
        "pretrain", replace(PretrainSettings(), engine=replace(gone.engine, channels_last=False))
    ) == ("lvssl pretrain --preset folder-r50 --no-channels-last")


@dataclass(frozen=True)
class Group:
    depth: int = 1
    speed: int = field(default=1, metadata=RUNTIME)


@dataclass(frozen=True)
class Whole:
    size: int = 1
    threads: int = field(default=1, metadata=RUNTIME)
    group: Group = field(default_factory=Group)


def test_a_field_says_whether_it_changes_the_result():
    fast = Whole(threads=4, group=Group(speed=9))
    assert runtime(fast) == {"threads", "group.speed"}
    assert identity(fast) == identity(Whole()) == {"size": 1, "group.depth": 1}
    assert beyond_defaults(fast) == {} == beyond_defaults(Whole(size=2), ["size"])
    assert beyond_defaults(Whole(2, group=Group(3))) == {"size": 2, "depth": 3}
    assert difference(Whole(), fast) == "" == difference(Whole(), Whole(group=Group(2)), ["depth"])
    assert difference(Whole(), Whole(2, group=Group(2))) == "size: 1 -> 2"
    assert difference(Whole(), Whole(group=Group(2))) == "group.depth: 1 -> 2"


def test_no_two_settings_of_a_command_have_one_name_on_the_command_line():
    for settings in CALLS.values():
        names = [setting.option for setting in all_settings(settings)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("number", ["inf", "nan"])
def test_no_number_may_be_infinite_in_any_command(number):
    named = set()
    for name, settings in CALLS.items():
        floats = [each for each in all_settings(settings) if is_float(each.value)]
        for each in floats[-1:]:  # each command takes a second
            option = f"--{each.option.replace('_', '-')}"
            typed = [number] * (len(each.value) if isinstance(each.value, tuple) else 1)
            words = [*shlex.split(command(name.partition(" ")[0], settings)), option, *typed]
            with pytest.raises(InputError, match=f"^{option} must be a finite number, got {number}$"):
                retyped(words, type(settings))
            named.add(name.partition(" ")[0])
    assert named == {"pretrain", "linear", "knn", "finetune"}
    with pytest.raises(InputError, match="^--weight-decay must be a finite number"):
        PretrainSettings(optimiser=OptimiserSettings(weight_decay=float(number))).validate()


@pytest.mark.parametrize(
    "typed, needed",
    [
        ("--relaxation-start 2", "--estimator relaxed"),
        ("--relaxation 2", "--estimator relaxed"),
        ("--anneal 0.1", "--init-scale-start or --relaxation-start"),
        ("--beta-cycles 2 --family gaussian", "--beta-schedule cyclical"),
        ("--components 8", "--family mixture"),
        ("--depth 3", "--family gaussian or beta or mixture or laplace"),
        ("--nesterov", "--optimiser sgd or lars"),
        ("--trust 1", "--optimiser lars"),
    ],
)
def test_an_option_without_effect_is_refused_before_anything_is_written(typed, needed, digits, tmp_path):
    words = ["pretrain", "--preset", "digits", "--data", str(digits["train"]), "--out", str(tmp_path / "run")]
    settings = retyped(["lvssl", *words, *typed.split()], PretrainSettings)
    settings.validate()  # a run that was begun with it can be read
    option = typed.split()[0]
    with pytest.raises(InputError, match=f"^{option} has no effect: leave it out, or pass {needed}$"):
        pretrain(settings)
    assert not (tmp_path / "run").exists()


def test_what_a_preset_sets_has_an_effect_and_a_control_may_repeat_what_the_latent_has():
    for settings in PRESETS.values():
        settings.require_used()
    annealed = LatentSettings(estimator="relaxed", relaxation=1.0, relaxation_start=2.0, anneal=0.2)
    for latent in (annealed, LatentSettings(family="none", relaxation=1.0, anneal=0.2)):
        PretrainSettings(latent=latent).require_used()
    LinearSettings(RUN, probe="sgd", epochs=1, lr=1.0).validate()
    LinearSettings(RUN, probe="streamed", probe_epochs=1).validate()
    with pytest.raises(InputError, match="^--lr has no effect on the probe logistic: leave it out"):
        LinearSettings(RUN, probe="logistic", lr=1.0).validate()


def is_float(value: object) -> bool:
    return isinstance(value[0] if isinstance(value, tuple) and value else value, float)


@pytest.mark.parametrize("values", [3, None, ["latent"], {"latent": 3}, {"latent": [1]}])
def test_stored_settings_that_are_no_object_are_refused(values):
    with pytest.raises(InputError, match=r"^c\.json(\.latent)?: settings by name are expected, not \w+$"):
        from_dict(PretrainSettings, values, "c.json")
    assert from_dict(PretrainSettings, to_dict(PretrainSettings())) == PretrainSettings()
