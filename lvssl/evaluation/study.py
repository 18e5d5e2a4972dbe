"""A study: train every arm over several seeds, measure all runs in the same way, and compare them in pairs.

Arms differ only in the settings that they name; data, order, augmentation and steps are determined by the
seed. A finished run is not trained again, and its measures are kept in its folder, so that an interrupted
study resumes when its command is repeated, and its parts can be an array job (--shard K/N). Run folders are
named PREFIX-ARM-sSEED. Existing runs are used if their settings are the same (apart from threads, paths and
the like), so studies can share runs.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from lvssl.evaluation.measures import (
    FIRST,
    HASHES,
    MEASURES,
    SCORES,
    code_bits,
    equal_bit_codes,
    measured,
    without_opq,
)
from lvssl.evaluation.pairs import pairs, summary
from lvssl.evaluation.quantisers import own_bits
from lvssl.evaluation.sets import Sampling
from lvssl.runs.labels import open_pair, say_if_same
from lvssl.runs.result import as_number, read_result
from lvssl.runs.rows import Row
from lvssl.runs.run import load_run, versions
from lvssl.settings.fields import replaced, to_dict
from lvssl.settings.measure import StudySettings
from lvssl.settings.presets import command
from lvssl.settings.pretrain import PRESETS, PretrainSettings, at_least, choice, preset
from lvssl.training.pretrain import pretrain
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.files import write_json
from pipelines.formats import jpeg

KEPT = "study.json"  # in each run's folder
SWITCHES = dict.fromkeys(("true", "1", "yes"), True) | dict.fromkeys(("false", "0", "no"), False)


def study(settings: StudySettings) -> dict[str, Any] | None:
    """Do what isn't done yet, write study.json in `out`, and return its content (None for a shard).

    Raises:
        InputError: an unknown preset, arm or setting, a repeated arm, a shard that isn't K/N, or missing
            images, all before any work; or a run folder with other settings.
    """
    choice("preset", settings.preset, tuple(PRESETS))
    at_least(settings, max_images=0)
    if not settings.arms or not settings.seeds:
        raise InputError("--arms, --seeds: at least one of each is needed")
    plans = [plan(settings, arm, seed) for seed in settings.seeds for arm in settings.arms]
    if len({p.out for p in plans}) < len(plans):
        raise InputError("--arms, --seeds: two arms of one name, or a seed twice")
    for chosen in plans:
        chosen.validate()
        if not (chosen.out / "config.json").exists():
            chosen.require_used()
    jpeg.read_up_to(settings.max_pixels)
    say_if_same(*open_pair(settings.train, settings.test))
    for path in settings.ood:
        open_reader(path)
    lengths = tuple(sorted({code_bits(chosen) for chosen in plans}))
    left_out = without_opq()
    first, step = shard(settings.shard)
    runs, rows = [], []
    for number, chosen in enumerate(plans[first::step], 1):
        print(f"== {chosen.out.name} ({number} of {len(plans[first::step])})", file=sys.stderr, flush=True)
        described, found = of_run(settings, chosen, lengths)
        runs.append(described)
        rows += found
    if settings.shard:
        return None
    result = {
        "settings": to_dict(settings),
        "versions": versions(),
        "command": command("study", settings),
        "measures": {name: measure._asdict() for name, measure in MEASURES.items()},
        "arms": summary(runs, rows),
        "pairs": pairs(runs, rows),
        "left_out": left_out,
        "runs": runs,
        "rows": rows,
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(settings.out / "study.json", result)
    return result


def shard(text: str) -> tuple[int, int]:
    """Parse "K/N", 1 <= K <= N, as (K - 1, N), and "" as (0, 1). Raises InputError for anything else."""
    if not text:
        return 0, 1
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise InputError(f"--shard must be K/N with 1 <= K <= N, such as 1/8 to 8/8, got {text!r}")
    return int(k) - 1, int(n)


def plan(settings: StudySettings, arm: str, seed: int) -> PretrainSettings:
    """Return the pretraining settings for an arm and a seed."""
    base = preset(settings.preset)
    name, changes = parsed(arm)
    given = {
        "data": settings.train,
        "out": (settings.runs or settings.out) / f"{start_of(settings)}{name}-s{seed}",
        "seed": seed,
        "threads": settings.threads,
        "on_error": settings.on_error,
        "max_pixels": settings.max_pixels,
        "epochs": settings.epochs or base.epochs,
    }
    return replaced(base, given | parsed_values(base, arm, changes))


def parsed(arm: str) -> tuple[str, dict[str, str]]:
    """Return the arm's name and its settings, as text."""
    name, colon, text = arm.partition(":")
    return name, dict(pair.partition("=")[::2] for pair in text.split(",")) if colon else {"family": name}


def start_of(settings: StudySettings) -> str:
    """Return the prefix of the run folders' names."""
    return f"{settings.prefix}-" if settings.prefix else ""


def parsed_values(base: PretrainSettings, arm: str, changes: dict[str, str]) -> dict[str, Any]:
    """Parse an arm's values of settings of latent and model to the types of their defaults."""
    defaults = {f.name: f.default for of in (base.latent, base.model) for f in dataclasses.fields(of)}
    made = {}
    for name, text in changes.items():
        if name not in defaults:
            raise InputError(f"arm {arm!r}: unknown setting {name!r}; known: {', '.join(defaults)}")
        kind: Any = float if defaults[name] is None else type(defaults[name])
        try:
            made[name] = SWITCHES[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            wanted = "true or false" if kind is bool else f"a {kind.__name__}"
            raise InputError(f"arm {arm!r}: {name} must be {wanted}, got {text!r}") from error
    return made


def of_run(
    settings: StudySettings, chosen: PretrainSettings, lengths: tuple[int, ...]
) -> tuple[dict[str, Any], list[Row]]:
    """Return a description of one run and its measurements, after training and measuring it if necessary."""
    pretrain(chosen, resume=True)
    run = load_run(chosen.out)
    told = to_dict(settings)
    protocol = {name: told[name] for name in ("train", "test", "max_images", "ood")}
    protocol |= {"top_n": FIRST, "scores": SCORES}
    kept = chosen.out / KEPT
    found = read_result(kept, rows=list, lengths=list, codes=list) if kept.exists() else {}
    same = (found.get("checkpoint"), found.get("protocol")) == (run.digest, protocol) and found.get("rows")
    same = same and {"deterministic", "bits", "features"} <= found.keys()
    codes = [] if run.network.family.stochastic else equal_bit_codes({*lengths, own_bits(run)})
    # Codes that have been tried. The first files only have HASHES, without saying so.
    old = [(method, bits) for method in HASHES for bits in found.get("lengths") or ()]
    tried = {(method, bits) for method, bits in found.get("codes") or old} if same else set()
    if not same or set(codes) - tried:
        sampling = Sampling(settings.max_images, ood=settings.ood)
        sets = open_pair(settings.train, settings.test)
        missing = [code for code in codes if code not in tried]
        described, rows = measured(run, *sets, settings.test, missing, sampling, codes_alone=bool(same))
        origin = {"checkpoint": run.digest, "arithmetic": run.arithmetic, "protocol": protocol}
        rows = [*found["rows"], *rows] if same else rows
        found = origin | {"codes": sorted(tried | set(codes)), **described, "rows": rows}
        write_json(kept, found)
    arm = chosen.out.name.removeprefix(start_of(settings)).rpartition("-s")[0]
    rows = [row | {"run": arm, "value": as_number(row["value"])} for row in found["rows"]]
    named = {"arm": arm, "seed": chosen.seed, "family": chosen.latent.family}
    return named | {name: value for name, value in found.items() if name != "rows"}, rows
