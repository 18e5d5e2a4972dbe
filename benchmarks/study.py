"""Studies on real images, on both data sets, as their tables stand in docs/.

    python -m benchmarks.study --cifar10 cifar10-jpeg     all arms and seeds: hours on two cores
    python -m benchmarks.study --shard 1/2 --threads 1    half of the runs; beside it 2/2; then collect
    python -m benchmarks.study --question codes           is the latent's code worth its bits?
    python -m benchmarks.study --data cifar10-jpeg --images 50000 --epochs 4      as many steps, more images
    python -m benchmarks.study --leave-out 8 9            scores against classes that no training has seen
    python -m benchmarks.study --print                    docs/results.md's tables, from the files in --docs

Arms of the same settings, steps, order and augmentation, over three seeds, with the settings of the presets
`fashion-mnist` and `cifar10-small`, 10,000 training images each. Of the question `uncertainty`, with SimCLR's
own objective, `--objective ntxent`:

    none, sign       the controls: plain SimCLR, and the same with its sign bits decorrelated; no latent
    bernoulli256     a bit for each feature
    gaussian         means and variances; its code: the means' signs
    mcinfonce        von Mises-Fisher at the projection by MCInfoNCE (Kirchhof et al. 2023): an uncertainty

of the question `base`, on plain SimCLR, sign bits and a latent of a bit for each feature:

    none, sign, bernoulli256             as above
    none-vc, sign-vc, bernoulli256-vc    VICReg's variance and covariance beside: the presets' ntxent-vc

of the question `objectives`, none and none-vc beside:

    dcl, dcl-vc        NT-Xent without the positive in the denominator (Yeh et al. 2022), and with both terms
    vicreg             invariance, variance, covariance (Bardes et al. 2022), without negatives
    ceb                C-SimCLR as published (Lee et al. 2021): kappa_e 1,024, kappa_b 10, at the projector

and of the question `codes`, none-vc and sign-vc beside codes of so many bits:

    bernoulli64-vc, bernoulli256-vc, bernoulli2048-vc

The questions share their runs. Each data set is the other's out-of-distribution set. With --leave-out
pretraining, probes and scores see the other classes alone (--images of these), and the test images of the
classes left out are one more out-of-distribution set. Writes docs/study-NAME.md, .csv, .json and .png, or
docs/codes-NAME.* and the like of the other questions; NAME ends with the classes left out, as
without-8-9, and with the number of training images unless that is 10,000.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages.study import ARMS as GPU_ARMS
from benchmarks.script import parser_of
from lvssl.commands.demo import fashion_mnist
from lvssl.commands.main import guarded
from lvssl.evaluation.pairs import BEST
from lvssl.evaluation.study import study
from lvssl.report.study import markdown, write_study
from lvssl.runs.differences import interval
from lvssl.settings.measure import StudySettings
from pipelines.convert.conversion import ConvertOptions, convert
from pipelines.convert.conversion import Settings as ConvertSettings
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.files import write_atomically, write_json
from pipelines.formats.manifest import manifest_path, read_manifest

PLAIN = "objective=ntxent"  # which the presets don't have
VC = f"{PLAIN},variance=5,covariance=1"  # is --objective ntxent-vc, which they have
SETTINGS = {
    "none": f"family=none,{PLAIN}",
    "sign": f"family=sign,{PLAIN}",
    "bernoulli256": f"family=bernoulli,{PLAIN}",
    "gaussian": f"family=gaussian,{PLAIN}",
    "mcinfonce": "family=vmf,site=proj,objective=mcinfonce",
    "none-vc": f"family=none,{VC}",
    "sign-vc": f"family=sign,{VC}",
    **{f"bernoulli{bits}-vc": f"family=bernoulli,dim={bits},{VC}" for bits in (64, 2048)},
    "bernoulli256-vc": f"family=bernoulli,{VC}",
    "dcl": "family=none,objective=dcl",
    "dcl-vc": "family=none,objective=dcl,variance=5,covariance=1",
    "vicreg": "family=none,objective=vicreg",
    "ceb": ",".join(f"{name}={value}" for name, value in GPU_ARMS["ceb"].items()),
}
ARMS = {
    "uncertainty": ("none", "sign", "bernoulli256", "gaussian", "mcinfonce"),
    "codes": ("none-vc", "sign-vc", "bernoulli64-vc", "bernoulli256-vc", "bernoulli2048-vc"),
    "base": ("none", "sign", "bernoulli256", "none-vc", "sign-vc", "bernoulli256-vc"),
    "objectives": ("none", "none-vc", "dcl", "dcl-vc", "vicreg", "ceb"),
}
FILES = {"uncertainty": "study"}  # of a question, in docs/, where they don't have its name
IMAGES = 10_000  # training images
PRESETS = {"fashion-mnist": "fashion-mnist", "cifar10-jpeg": "cifar10-small", "digits": "digits"}
NAMES = {"fashion-mnist": "fashion-mnist", "cifar10-jpeg": "cifar10"}  # in docs/
TITLES = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10 (JPEG)"}


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    if options.print:
        tables = [f(options.docs) for f in (base_table, objectives_table, codes_table, uncertainty_table)]
        print("\n\n".join("\n".join(lines) for lines in tables if lines))
        return
    others = [name for name in NAMES if name not in options.data] if NAMES.keys() & options.data else []
    tests = {name: converted(options, name, "test") for name in [*options.data, *others]}
    left_out = "".join(f"-{number}" for number in options.leave_out)
    part = f"-without{left_out}" if left_out else ""
    size = part + ("" if options.images == IMAGES else f"-{options.images}")
    for name in options.data:
        foreign = [test for key, test in tests.items() if key != name]
        seen, unseen = parted(tests[name], options.leave_out)
        if unseen:
            foreign.append(converted(options, name, "test", f"-classes{left_out}", unseen))
        settings = StudySettings(
            train=converted(options, name, "train", part, seen),
            test=converted(options, name, "test", part, seen),
            preset=PRESETS[name],
            out=options.out / f"{FILES.get(options.question, options.question)}-{name}{size}",
            runs=options.out,
            prefix=name + size,
            arms=tuple(
                f"{arm}:{SETTINGS[arm]}" if arm in SETTINGS else arm
                for arm in options.arms or ARMS[options.question]
            ),
            seeds=tuple(options.seeds),
            epochs=options.epochs,
            threads=options.threads,
            max_images=options.measured,
            ood=tuple(foreign),
            shard=options.shard,
        )
        result = study(settings)
        if result is not None:
            result["command"] = "python -m benchmarks.study " + " ".join(arguments)
            result["source"] = Path(read_manifest(manifest_path(settings.train))[0]["source"]).name
            write_study(settings.out, result)
            named = f"{FILES.get(options.question, options.question)}-{NAMES.get(name, name)}{size}"
            into_docs(settings.out, options.docs, named, result)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--question", choices=list(ARMS), default="uncertainty", help="which arms")
    parser.add_argument("--data", nargs="+", choices=list(PRESETS), default=list(NAMES))
    parser.add_argument("--arms", nargs="+", help="others, as of `lvssl study`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=IMAGES, help="training images")
    parser.add_argument("--leave-out", type=int, nargs="+", default=[], help="classes, by number, from 0")
    parser.add_argument("--measured", type=int, default=2000, help="test images for the uncertainty; 0: all")
    parser.add_argument("--epochs", type=int, default=0, help="of each run; 0: the preset's")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
    parser.add_argument("--shard", default="", help="K/N, as of `lvssl study`")
    parser.add_argument("--cifar10", default="torchvision:CIFAR10", help="what convert-beton takes")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="where the runs go")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the tables go")
    parser.add_argument("--print", action="store_true", help="docs/results.md's tables, and nothing else")
    return parser.parse_args(arguments)


def parted(test: Path, left_out: list[int]) -> tuple[list[str], list[str]]:
    """The names of a set's classes: of those that are seen, and of those left out. Both empty without any."""
    names = open_reader(test).classes or []
    if wrong := [number for number in left_out if not 0 <= number < len(names)]:
        raise InputError(f"--leave-out {wrong[0]}: {test} has the classes 0 to {len(names) - 1}")
    if not left_out:
        return [], []
    seen = [name for number, name in enumerate(names) if number not in left_out]
    return seen, [names[number] for number in left_out]


def converted(
    options: argparse.Namespace, data: str, split: str, part: str = "", classes: Sequence[str] = ()
) -> Path:
    """The beton of a split, converted unless that is done; `part`: what the name says of its `classes`."""
    images = options.images if split == "train" else ""
    out: Path = options.out / "data" / f"{data}{part}-{split}{images}.beton"
    if out.exists():
        made_of = read_manifest(manifest_path(out))[0]["source"]
        if data == "cifar10-jpeg" and Path(made_of).name != Path(options.cifar10).name:
            raise InputError(f"{out} was converted from {made_of}, not from --cifar10: choose another --out")
    else:
        source = {"cifar10-jpeg": options.cifar10, "digits": "sklearn:digits"}.get(data) or fashion_mnist()
        subset = options.images if split == "train" and data != "digits" else None
        how = ConvertOptions(split=split, root=options.out / "downloads")
        convert(source, out, ConvertSettings(subset=subset, only_classes=list(classes)), how)
    return out


def into_docs(found: Path, docs: Path, name: str, result: dict[str, Any]) -> None:
    """The tables and the picture of one data set, and every row behind them."""
    docs.mkdir(parents=True, exist_ok=True)
    write_atomically(docs / f"{name}.md", page(name, result).encode())
    write_json(docs / f"{name}.json", result)
    shutil.copyfile(found / "study.csv", docs / f"{name}.csv")
    shutil.copyfile(found / "figures" / "accuracy.png", docs / f"{name}.png")


def page(name: str, result: dict[str, Any]) -> str:
    """The study's Markdown with its picture, as it stands in docs/."""
    head = "\n## Codes of equal length\n"
    return markdown(result).replace(head, f"{head}\n![Accuracy against bits stored]({name}.png)\n")


# The tables of docs/results.md ----------------------------------------------------------------------------


def kept(docs: Path, question: str, titles: dict[str, str] = TITLES) -> dict[str, dict[str, Any]]:
    """The results of a question by their data set's title, of those that are there. For CIFAR-10 of another
    source than the JPEG copy, the title names that."""
    found = {}
    for name, title in titles.items():
        path = docs / f"{FILES.get(question, question)}-{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            other = result.get("source", "cifar10-jpeg") not in PRESETS
            found[title.replace("JPEG", result["source"]) if other else title] = result
    return found


BASE = {
    "features_linear": "features, linear probe",
    "features_knn": "features, kNN",
    "code_linear": "best code of 256 bits, linear probe",
    "code_knn": "best code of 256 bits, kNN",
}


def base_table(docs: Path) -> list[str]:
    """With variance and covariance beside NT-Xent and without."""
    shown = ("none", "none-vc", "sign-vc", "bernoulli256", "bernoulli256-vc")
    compared = (
        ("none-vc", "none"),
        ("bernoulli256-vc", "bernoulli256"),
        ("bernoulli256-vc", "none-vc"),
        ("bernoulli256-vc", "sign-vc"),
    )
    results = kept(docs, "base", {**TITLES, "cifar10-50000": "CIFAR-10, 50,000 images"})
    return table_of(results, shown, compared)


def objectives_table(docs: Path) -> list[str]:
    """Each objective without a latent (but for `ceb`), and against the presets'."""
    shown = ARMS["objectives"]
    compared = [(arm, "none-vc") for arm in shown[2:]]
    return table_of(kept(docs, "objectives"), shown, compared)


def table_of(
    results: dict[str, dict[str, Any]], shown: Sequence[str], compared: Sequence[tuple[str, str]]
) -> list[str]:
    """Means in percent, and differences paired by seed ± standard error; no lines without results."""
    head = "| measure | data | " + " | ".join([*shown, *(f"{a} - {b}" for a, b in compared)]) + " |"
    lines = [head, "| --- " * (2 + len(shown) + len(compared)) + "|"]
    for name, says in BASE.items():
        for title, result in results.items():
            of = {arm["arm"]: arm["measures"][name] for arm in result["arms"]}
            cells = [percent(of.get(arm)) for arm in shown]
            for a, b in compared:
                values = [of[arm]["values"] if arm in of else [] for arm in (a, b)]
                each = [x - y for x, y in zip(*values)]
                cells.append(difference(each) if each else "-")
            lines.append(f"| {says} | {title} | " + " | ".join(cells) + " |")
    return lines if results else []


def difference(each: list[float]) -> str:
    found = interval(each)
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.2f}"
    return f"{found['mean']:+.2f}{error}"


def percent(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    method = "" if found["method"] in ("", "code") else f" ({found['method']})"
    return f"{statistics.mean(found['values']):.1f}{method}"


def codes_table(docs: Path) -> list[str]:
    """Each latent minus the best control, paired by seed, ± standard error, for features and codes.

    Features are compared where the code has a bit for each: no layer stands between them and the latent.
    """
    lines: dict[tuple[int, str], list[str]] = {}
    for title, result in kept(docs, "codes").items():
        bits = {arm["arm"]: (arm["bits"], arm["features"]) for arm in result["arms"]}
        for pair in result["pairs"]:
            length, width = bits[pair["arm"]]
            what, _, metric = pair["measure"].partition("_")
            if pair["control"] != BEST or metric not in ("linear", "knn"):
                continue
            if what == "features" and (length, metric) != (width, "linear"):
                continue
            says = f"{'features' if what == 'features' else f'code of {length:,} bits'}, "
            says += {"linear": "linear probe", "knn": "Hamming kNN"}[metric]
            arm, _, method = pair["against"].partition(", ")
            seeds = ", ".join(f"{value:+.2f}" for value in pair["each"])
            control = f"{method} of `{arm}`" if method else f"features of `{arm}`"
            gain = f"{pair['mean']:+.2f} ± {pair['standard_error']:.2f}"
            row = f"| {says} | {title} | {gain} | {seeds} | {control} |"
            lines.setdefault((0 if what == "features" else length, metric), []).append(row)
    head = "| measure | data | latent minus the best control | seed by seed | the best control |"
    ordered = sorted(lines, key=lambda key: (key[0], key[1] != "linear"))
    return [head, "| --- " * 5 + "|", *(line for key in ordered for line in lines[key])]


UNCERTAINTY = (  # (title, measure, score; none: the strongest, named if it is a control's)
    ("R-AUROC by the posterior's own score; controls: their best", "latent_r_auroc", None),
    ("R-AUROC by the distance to the nearest training images", "r_auroc", "distance"),
    (
        "AUROC against out-of-distribution images, posterior's own score; controls: their best",
        "latent_ood",
        None,
    ),
    ("the same by distance", "ood", "distance"),
    ("mAP@1000 over hits of the code, controls: their best", "code_map", None),
)


def uncertainty_table(docs: Path) -> list[str]:
    """What the posteriors' scores, the distance to the nearest training images, and the codes are worth."""
    results = kept(docs, "uncertainty")
    arms = [arm["arm"] for arm in next(iter(results.values()))["arms"]]
    lines = ["| measure | data | " + " | ".join(arms) + " |", "| --- " * (2 + len(arms)) + "|"]
    for says, name, score in UNCERTAINTY:
        for title, result in results.items():
            cells = [cell(result, arm, name, score) for arm in result["arms"]]
            lines.append(f"| {says} | {title} | " + " | ".join(cells) + " |")
            says = ""
    return lines


def cell(result: dict[str, Any], arm: dict[str, Any], name: str, score: str | None) -> str:
    """A measure's mean over seeds; of one score, or of the arm's strongest, which is named for a code."""
    found = arm["measures"][name]
    metric = result["measures"][name]["metric"]
    if score is not None:
        rows = [row for row in result["rows"] if (row["run"], row["method"]) == (arm["arm"], score)]
        return f"{statistics.mean(row['value'] for row in rows if row['metric'] == metric):.3f}"
    named = f" ({found['method']})" if name == "code_map" and found["method"] != "code" else ""
    return f"{statistics.mean(found['values']):.3f}{named}"


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
