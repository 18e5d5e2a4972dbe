"""The report of a study: every run (CSV), the comparison (Markdown) and figures (PNG, SVG)."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lvssl.runs.rows import FOREIGN, Row, as_csv, by_point
from pipelines.files import write_atomically, written_aside

COLOURS = {"better": "#0f6b6f", "level": "#79818c", "worse": "#a3162a", "one seed": "#b5b9bf"}
OF_CODE = {  # columns of the table of codes
    "linear": "linear, %",
    "knn": "Hamming kNN, %",
    "map_over_hits": "mAP@1000 over hits",
    "map_over_relevant": "over relevant",
}
FOREIGN_SAYS = "AUROC of each score for separating test images from foreign ones; 0.5 is chance."
Measures = dict[str, dict[str, Any]]  # a result's "measures"
PROTOCOL = """Every measure is taken at the run's last checkpoint. Probes and neighbours are fitted on the
{database:,} training images and evaluated on all {queries:,} test images, uncertainty on {images:,} of these.

**mAP@1000**: each of the {queries:,} test images queries the {database:,} training images; those with its
label are relevant. The precisions at the hits within the first 1,000 results are averaged; images at the same
distance contribute their expected value over all orders. *Over hits* divides by the number of hits found (the
denominator of the hashing literature), *over relevant* by min(1,000, relevant images), so that missing hits
lower it, too. Codes are compared by Hamming distance, features by cosine similarity.

**Controls of equal bits**: sign bits (the first ones if the code is shorter), PCA + sign,
ITQ{last} of a control's features,
fitted on the training images. Each side of a comparison uses its strongest method (in brackets), the one with
the best mean over the seeds: for codes the method, for uncertainty the score without labels (a latent's
posterior and rate; any model's feature norm and distance to the nearest training images). *The best control*
is the strongest among all arms without a latent. This choice is made on the test images and favours the side
with more methods.

**Paired differences**: arm minus control, seed by seed; their mean and its 95 % interval (Student's t). If
the interval excludes 0, the verdict is better or worse; of 20 measures without a difference, one will be."""


def write_study(out: Path, result: dict[str, Any]) -> list[Path]:
    """Write study.csv, study.md and figures/ next to study.json, and return their paths."""
    files = {"study.csv": as_csv(result["rows"]), "study.md": markdown(result)}
    for name, text in files.items():
        write_atomically(out / name, text.encode())
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    drawn = {"accuracy": accuracy(result), "differences": differences(result["pairs"], result["measures"])}
    paths = [out / name for name in files]
    for name, figure in drawn.items():
        for kind in ("png", "svg"):
            paths.append(figures / f"{name}.{kind}")
            with written_aside(paths[-1]) as file:
                figure.savefig(file, format=kind, dpi=150, bbox_inches="tight")
        plt.close(figure)
    return paths


def markdown(result: dict[str, Any]) -> str:
    settings, runs, pairs, measures = (result[name] for name in ("settings", "runs", "pairs", "measures"))
    seeds = ", ".join(map(str, settings["seeds"]))
    told = {
        "images": min(settings["max_images"] or runs[0]["queries"], runs[0]["queries"]),
        "last": " and LSH",
    }
    if any(row["method"] == "OPQ" for row in result["rows"]):
        told["last"] = ", LSH and OPQ (by the cosine similarity of the vectors that its codes represent)"
    parts = [
        [f"# Study: {settings['preset']}, seeds {seeds}"],
        [f"```\n{result['command']}\n```"],
        ["## Conclusions", "", *(conclusions(pairs, measures) or ["No control was among the arms."])],
        ["## Protocol", "", PROTOCOL.format(**runs[0] | told)],
        ["## Means over seeds (± standard deviation)", "", *means(result["arms"], measures)],
        *foreign_images(result),
        ["## Codes of equal length", "", *codes(result["rows"])],
        ["## Paired differences", "", *differences_table(pairs, measures)],
    ]
    return "\n".join("\n".join([*part, ""]) for part in parts)


def means(arms: list[dict[str, Any]], measures: Measures) -> list[str]:
    lines = ["| measure | " + " | ".join(arm["arm"] for arm in arms) + " |", "| --- |" + " --- |" * len(arms)]
    for name, measure in measures.items():
        cells = [mean_cell(**arm["measures"][name]) if name in arm["measures"] else "" for arm in arms]
        what = measure["says"] + ("" if measure["higher"] else " (lower is better)")
        if any(cells):
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return lines


def mean_cell(values: list[float], method: str = "") -> str:
    mean = statistics.mean(values)
    digits = 1 if abs(mean) >= 10 else 3  # a percentage, or a share
    known = len(values) > 1 and math.isfinite(mean)  # stdev can't take NaN
    spread = f" ± {statistics.stdev(values):.{digits}f}" if known else ""
    return f"{mean:.{digits}f}{spread}" + (f" ({method})" if method and method != "code" else "")


def foreign_images(result: dict[str, Any]) -> list[list[str]]:
    """Return the section on each arm's AUROC against each out-of-distribution set, and its mean over the
    sets, by score. It is empty if no set was measured separately."""
    rows = [row for row in result["rows"] if row["representation"] == "uncertainty"]
    sets = list(dict.fromkeys(row["metric"] for row in rows if row["metric"].startswith(FOREIGN)))
    if not sets:
        return []
    scores = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| foreign images | arm | " + " | ".join(scores) + " |", "| --- " * (2 + len(scores)) + "|"]
    for metric in (*sets, FOREIGN.strip()):
        for arm in (arm["arm"] for arm in result["arms"]):
            found = [values_of(rows, arm, "uncertainty", score, metric)[1] for score in scores]
            cells = [mean_cell(values) if values else "" for values in found]
            says = metric.removeprefix(FOREIGN) if metric in sets else "mean of all"
            lines.append(f"| {says} | {arm} | " + " | ".join(cells) + " |")
    return [["## Foreign images", "", FOREIGN_SAYS, "", *lines]]


def codes(rows: list[Row]) -> list[str]:
    """Return the table of all codes, the arms' own and the controls', sorted by length."""
    found: dict[tuple[int, str, str], list[Row]] = {}
    for point in by_point(row for row in rows if row["representation"] == "code"):
        found.setdefault((point["bits"], point["run"], point["method"]), []).append(point)
    columns = {name: head for name, head in OF_CODE.items() if any(row["metric"] == name for row in rows)}
    lines = ["| bits | arm | code | " + " | ".join(columns.values()) + " |"]
    lines.append("| --- " * (3 + len(columns)) + "|")
    for (bits, arm, method), points in sorted(found.items()):
        cells = [mean_cell([point[name] for point in points]) for name in columns]
        code = "its own" if method == "code" else method
        lines.append(f"| {bits:,} | {arm} | {code} | " + " | ".join(cells) + " |")
    return lines


def differences_table(pairs: list[dict[str, Any]], measures: Measures) -> list[str]:
    lines = ["| measure | arm | control | difference | 95 % | verdict |", "| --- " * 6 + "|"]
    for pair in pairs:
        digits = digits_of(pair, measures)
        span = " to ".join(f"{v:+.{digits}f}" for v in pair["interval"] or [])
        sides = [
            f"{pair[name]} ({pair[method]})" if pair[method] not in ("", "code") else pair[name]
            for name, method in (("arm", "of"), ("control", "against"))
        ]
        lines.append(
            f"| {measures[pair['measure']]['says']} | {sides[0]} | {sides[1]} | {pair['mean']:+.{digits}f} | "
            f"{span} | {pair['verdict']} |"
        )
    return lines


def conclusions(pairs: list[dict[str, Any]], measures: Measures) -> list[str]:
    """Return a line per arm and control: what differs, by how much, and in how many measures nothing does."""
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


def told(pair: dict[str, Any], measures: Measures) -> str:
    return f"{measures[pair['measure']]['says']} ({pair['mean']:+.{digits_of(pair, measures)}f})"


def digits_of(pair: dict[str, Any], measures: Measures) -> int:
    return 2 if measures[pair["measure"]]["says"].endswith("%") else 3


def accuracy(result: dict[str, Any]) -> Any:
    """Plot accuracy and mAP against stored bits: the arms' codes, the equal-bit controls, the features."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    titles = {
        "linear": "linear probe, %",
        "knn": "20 nearest neighbours, %",
        "map_over_hits": "mAP@1000 over hits",
    }
    for axis, (kind, title) in zip(axes, titles.items()):
        for number, arm in enumerate(result["arms"]):
            name, colour = arm["arm"], f"C{number}"
            for bits, method, values in controls_of(result["rows"], name, kind):
                label = f"codes of {name}'s features" if (bits, method) == (arm["bits"], "sign") else None
                axis.plot(bits * 1.04**number, statistics.mean(values), "x", color=colour, ms=5, label=label)
            points = [("s", *values_of(result["rows"], name, "features", "", kind), f"{name}, features")]
            points.append(("o", *values_of(result["rows"], name, "code", "code", kind), f"{name}, code"))
            for marker, bits, values, label in points:
                if not values:
                    continue
                error = statistics.stdev(values) if len(values) > 1 else 0
                place, mean = bits * 1.04**number, statistics.mean(values)
                axis.errorbar(place, mean, error, fmt=marker, color=colour, label=label, capsize=3)
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


def controls_of(rows: list[Row], arm: str, metric: str) -> list[tuple[int, str, list[float]]]:
    """Return (bits, method, values by seed) of every equal-bit control of an arm."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        if (row["run"], row["representation"], row["metric"]) == (arm, "code", metric):
            found.setdefault((row["bits"], row["method"]), []).append(row["value"])
    return [(bits, method, values) for (bits, method), values in found.items() if method != "code"]


def values_of(
    rows: list[Row], arm: str, representation: str, method: str, metric: str
) -> tuple[int, list[float]]:
    """Return (bits, values by seed) of what has one length: features or an own code; (0, []) if missing."""
    wanted = (arm, representation, method, metric)
    found = [r for r in rows if (r["run"], r["representation"], r["method"], r["metric"]) == wanted]
    return (found[0]["bits"] if found else 0), [row["value"] for row in found]


def differences(pairs: list[dict[str, Any]], measures: Measures) -> Any:
    """Plot each arm's paired differences and their 95 % intervals. Each measure is scaled to its largest
    difference, and its sign chosen so that right is better."""
    keys = list(dict.fromkeys((pair["arm"], pair["control"]) for pair in pairs))
    names = [name for name in measures if any(pair["measure"] == name for pair in pairs)]
    size = 1.9 * max(1, len(keys)) + 4, 0.32 * len(names) + 1
    figure, axes = plt.subplots(1, max(1, len(keys)), figsize=size, sharey=True)
    for axis, (arm, control) in zip([axes] if len(keys) <= 1 else axes, keys):
        for pair in (p for p in pairs if (p["arm"], p["control"]) == (arm, control)):
            place = -names.index(pair["measure"])
            scale = max(map(abs, [*pair["each"], 1e-12])) * (1 if measures[pair["measure"]]["higher"] else -1)
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
        axis.set_yticks(
            [-i for i in range(len(names))], [measures[name]["says"] for name in names], fontsize=8
        )
    return figure
