"""What a study found, for people: every run (CSV), the comparison (Markdown), figures (PNG, SVG)."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lvssl.latents import has_code
from pipelines.files import write_atomically

COLOURS = {"better": "#0f6b6f", "level": "#79818c", "worse": "#a3162a", "one seed": "#b5b9bf"}
OF_CODE = {  # the columns of the table of codes
    "code_linear": "linear, %",
    "code_knn": "Hamming kNN, %",
    "code_map": "mAP@1000 over hits",
    "code_map_relevant": "over relevant",
}
PROTOCOL = """Every measure is of the run's last checkpoint. Probes and neighbours are fitted on the
{database:,} training images and judged on all {queries:,} test images; uncertainty on {images:,} of these.

**mAP@1000**: each of the {queries:,} test images queries the {database:,} training images; relevant is what
has its label. The precisions at the hits within the first 1,000 are averaged; images at the same distance
count with the expected value over all their orders. *Over hits* divides by the number of hits found (the
denominator of the hashing literature), *over relevant* by min(1,000, relevant images), which a missing hit
lowers, too. Codes by Hamming distance, features by cosine.

**Controls of equal bits**: sign bits (the first ones where the code is shorter), PCA + sign, ITQ and LSH of
a control's features, fitted on the training images. In a comparison each side has its strongest method (in
brackets): of a code the method, of an uncertainty the score without labels (the latent's: posterior, rate;
anybody's: feature norm, distance to the nearest training images), the one of the best mean over the seeds.
That choice is made on the test images and favours whoever has more methods.

**Paired differences**: arm minus control, seed by seed; their mean and its 95 % interval (Student). An
interval without 0 is called better or worse: of 20 measures that don't differ at all, one will be."""


def write_study(out: Path, result: dict[str, Any], measures: dict[str, tuple[str, bool]]) -> list[Path]:
    """study.csv, study.md and figures/ beside study.json; returns their paths.

    `measures`: name -> (what it says, whether higher is better), as `lvssl.evaluation.measures.MEASURES`.
    """
    files = {"study.csv": table(result["rows"]), "study.md": markdown(result, measures)}
    for name, text in files.items():
        write_atomically(out / name, text.encode())
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    drawn = {"accuracy": accuracy(result), "differences": differences(result["pairs"], measures)}
    paths = [out / name for name in files]
    for name, figure in drawn.items():
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight")
            write_atomically(figures / f"{name}.{kind}", buffer.getvalue())
            paths.append(figures / f"{name}.{kind}")
        plt.close(figure)
    return paths


def table(rows: list[dict[str, Any]]) -> str:
    """Every number that was measured: one line for each run, measure, method and length of code."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["arm", "seed", "family", "bits", "measure", "method", "value"])
    for row in rows:
        head = [row["arm"], row["seed"], row["family"]]
        sets = {row["bits"]: row["measures"]} | {
            int(bits): made for bits, made in row["controls"].items() if int(bits) != row["bits"]
        }
        for bits, made in sets.items():
            for name, methods in made.items():
                writer.writerows([*head, bits, name, method, value] for method, value in methods.items())
    return buffer.getvalue()


def markdown(result: dict[str, Any], measures: dict[str, tuple[str, bool]]) -> str:
    settings, rows, pairs = result["settings"], result["rows"], result["pairs"]
    seeds = ", ".join(map(str, settings["seeds"]))
    told = {"images": min(settings["max_images"] or rows[0]["queries"], rows[0]["queries"])}
    parts = [
        [f"# Study: {settings['preset']}, seeds {seeds}"],
        [f"```\n{result['command']}\n```"],
        ["## Conclusions", "", *(conclusions(pairs, measures) or ["No control was among the arms."])],
        ["## Protocol", "", PROTOCOL.format(**rows[0] | told)],
        ["## Means over seeds (± standard deviation)", "", *means(result["arms"], measures)],
        ["## Codes of equal length", "", *codes(rows)],
        ["## Paired differences", "", *differences_table(pairs, measures)],
    ]
    return "\n".join("\n".join([*part, ""]) for part in parts)


def means(arms: list[dict[str, Any]], measures: dict[str, tuple[str, bool]]) -> list[str]:
    lines = ["| measure | " + " | ".join(arm["arm"] for arm in arms) + " |", "| --- |" + " --- |" * len(arms)]
    for name, (what, higher) in measures.items():
        cells = [mean_cell(**arm["measures"][name]) for arm in arms]
        lines.append(f"| {what}{'' if higher else ' (lower is better)'} | " + " | ".join(cells) + " |")
    return lines


def mean_cell(values: list[float], method: str = "") -> str:
    digits = 1 if abs(statistics.mean(values)) >= 10 else 3  # percent, or a share
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" + (
        f" ({method})" if method and method != "code" else ""
    )


def codes(rows: list[dict[str, Any]]) -> list[str]:
    """Every code that was made, sorted by length: the arms' own, and the controls'."""
    found: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        sets = {int(bits): made for bits, made in row["controls"].items()}
        sets.setdefault(row["bits"], {})
        for bits, made in sets.items():
            made = {name: {**made.get(name, {}), **own_code(row, bits, name)} for name in OF_CODE}
            for method in made["code_linear"]:
                value = {name: made[name][method] for name in OF_CODE}
                found.setdefault((bits, row["arm"], method), []).append(value)
    lines = ["| bits | arm | code | " + " | ".join(OF_CODE.values()) + " |", "| --- " * 7 + "|"]
    for (bits, arm, method), values in sorted(found.items()):
        cells = [mean_cell([v[name] for v in values]) for name in OF_CODE]
        lines.append(
            f"| {bits:,} | {arm} | {'its own' if method == 'code' else method} | " + " | ".join(cells) + " |"
        )
    return lines


def own_code(row: dict[str, Any], bits: int, name: str) -> dict[str, float]:
    own = row["measures"][name].get("code") if bits == row["bits"] else None
    return {} if own is None else {"code": own}


def differences_table(pairs: list[dict[str, Any]], measures: dict[str, tuple[str, bool]]) -> list[str]:
    lines = ["| measure | arm | control | difference | 95 % | verdict |", "| --- " * 6 + "|"]
    for pair in pairs:
        digits = digits_of(pair, measures)
        span = " to ".join(f"{v:+.{digits}f}" for v in pair["interval"] or [])
        sides = [
            f"{pair[name]} ({pair[method]})" if pair[method] not in ("", "code") else pair[name]
            for name, method in (("arm", "of"), ("control", "against"))
        ]
        lines.append(
            f"| {measures[pair['measure']][0]} | {sides[0]} | {sides[1]} | {pair['mean']:+.{digits}f} | "
            f"{span} | {pair['verdict']} |"
        )
    return lines


def conclusions(pairs: list[dict[str, Any]], measures: dict[str, tuple[str, bool]]) -> list[str]:
    """A line for each arm and control: what differs, by how much, and in how many measures nothing does."""
    found = []
    for arm, control in dict.fromkeys((pair["arm"], pair["control"]) for pair in pairs):
        those = [pair for pair in pairs if (pair["arm"], pair["control"]) == (arm, control)]
        if those[0]["verdict"] == "one seed":
            said = "Not decided by one seed."
        else:
            better, worse = (
                "; ".join(told(pair, measures) for pair in those if pair["verdict"] == verdict) or "nothing"
                for verdict in ("better", "worse")
            )
            level = sum(pair["verdict"] == "level" for pair in those)
            said = f"Better in {better}. Worse in {worse}. Level in {level} of {len(those)} measures."
        found.append(f"- **{arm}** against {control}: {said}")
    return found


def told(pair: dict[str, Any], measures: dict[str, tuple[str, bool]]) -> str:
    return f"{measures[pair['measure']][0]} ({pair['mean']:+.{digits_of(pair, measures)}f})"


def digits_of(pair: dict[str, Any], measures: dict[str, tuple[str, bool]]) -> int:
    return 2 if measures[pair["measure"]][0].endswith("%") else 3


def accuracy(result: dict[str, Any]) -> Any:
    """Accuracy and mAP against bits stored: the arms' codes, the equal-bit controls, the features."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    titles = {"linear": "linear probe, %", "knn": "20 nearest neighbours, %", "map": "mAP@1000 over hits"}
    for axis, (kind, title) in zip(axes, titles.items()):
        for number, arm in enumerate(result["arms"]):
            name, colour = arm["arm"], f"C{number}"
            for bits, method, values in controls_of(result["rows"], name, f"code_{kind}"):
                label = f"codes of {name}'s features" if (bits, method) == (arm["bits"], "sign") else None
                axis.plot(bits * 1.04**number, statistics.mean(values), "x", color=colour, ms=5, label=label)
            points = [("s", 32 * arm["features"], arm["measures"][f"features_{kind}"], f"{name}, features")]
            if has_code(arm["family"]):
                points.append(("o", arm["bits"], arm["measures"][f"code_{kind}"], f"{name}, code"))
            for marker, bits, found, label in points:
                values = found["values"]
                error = statistics.stdev(values) if len(values) > 1 else 0
                axis.errorbar(
                    bits * 1.04**number,
                    statistics.mean(values),
                    error,
                    fmt=marker,
                    color=colour,
                    label=label,
                    capsize=3,
                )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda bits, _: f"{bits:,.0f}")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8
    )
    figure.supxlabel("bits stored an image, means over seeds and their deviation", fontsize=10)
    figure.tight_layout()
    return figure


def controls_of(rows: list[dict[str, Any]], arm: str, name: str) -> list[tuple[int, str, list[float]]]:
    """(bits, method, values by seed) of every equal-bit control of an arm."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in (row for row in rows if row["arm"] == arm):
        for bits, made in row["controls"].items():
            for method, value in made.get(name, {}).items():
                found.setdefault((int(bits), method), []).append(value)
    return [(bits, method, values) for (bits, method), values in found.items()]


def differences(pairs: list[dict[str, Any]], measures: dict[str, tuple[str, bool]]) -> Any:
    """Each arm's paired differences and their 95 % intervals, each measure scaled to its largest difference
    and turned so that right is better."""
    keys = list(dict.fromkeys((pair["arm"], pair["control"]) for pair in pairs))
    figure, axes = plt.subplots(
        1, max(1, len(keys)), figsize=(1.9 * max(1, len(keys)) + 4, 0.32 * len(measures) + 1), sharey=True
    )
    names = list(measures)
    for axis, (arm, control) in zip([axes] if len(keys) <= 1 else axes, keys):
        for pair in (p for p in pairs if (p["arm"], p["control"]) == (arm, control)):
            place = -names.index(pair["measure"])
            scale = max(map(abs, [*pair["each"], 1e-12])) * (1 if measures[pair["measure"]][1] else -1)
            low, high = (v / scale for v in (pair["interval"] or [pair["mean"]] * 2))
            colour = COLOURS[pair["verdict"]]
            axis.plot([low, high], [place, place], color=colour, lw=2)
            axis.plot([v / scale for v in pair["each"]], [place] * len(pair["each"]), "|", color=colour, ms=9)
            axis.plot(pair["mean"] / scale, place, "o", color=colour)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_xlim(-2.5, 2.5)
        axis.set_xticks([])
        axis.set_xlabel("worse  |  better", fontsize=9)
        axis.set_title(f"{arm} - {control}", fontsize=10)
        axis.set_yticks([-i for i in range(len(names))], [measures[name][0] for name in names], fontsize=8)
    return figure
