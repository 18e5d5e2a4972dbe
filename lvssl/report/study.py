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

from pipelines.files import write_atomically

WORDS = {"better": "Better", "worse": "Worse", "level": "Level", "one seed": "Not decided by one seed"}
COLOURS = {"better": "#0f6b6f", "level": "#79818c", "worse": "#a3162a", "one seed": "#b5b9bf"}


def write_study(out: Path, result: dict[str, Any], measures: dict[str, tuple[str, bool]]) -> list[Path]:
    """study.csv, study.md and figures/ beside study.json; returns their paths.

    `measures`: name -> (what it says, whether higher is better), as `lvssl.evaluation.study.MEASURES`.
    """
    files = {"study.csv": table(result["rows"], measures), "study.md": markdown(result, measures)}
    for name, text in files.items():
        write_atomically(out / name, text.encode())
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    drawn = {"accuracy": accuracy(result["rows"]), "differences": differences(result["pairs"], measures)}
    paths = [out / name for name in files]
    for name, figure in drawn.items():
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight")
            write_atomically(figures / f"{name}.{kind}", buffer.getvalue())
            paths.append(figures / f"{name}.{kind}")
        plt.close(figure)
    return paths


def table(rows: list[dict[str, Any]], measures: dict[str, Any]) -> str:
    """One line a run."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["arm", "seed", "family", "bits", "rate_bits", *measures])
    for row in rows:
        head = [row["arm"], row["seed"], row["family"], row["bits"], row["rate_bits"]]
        writer.writerow([*head, *(row["measures"][name] for name in measures)])
    return buffer.getvalue()


def markdown(result: dict[str, Any], measures: dict[str, tuple[str, bool]]) -> str:
    settings, rows, pairs = result["settings"], result["rows"], result["pairs"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    seeds = ", ".join(map(str, settings["seeds"]))
    lines = [f"# Study: {settings['preset']}, seeds {seeds}", "", "## Conclusions", ""]
    lines += conclusions(pairs, measures) or ["No control was among the arms: nothing is compared."]
    lines += ["", "## Means over seeds (± standard deviation)", ""]
    lines += ["| measure | " + " | ".join(arms) + " |", "| --- |" + " --- |" * len(arms)]
    for name, (what, higher) in measures.items():
        cells = [mean_cell([r["measures"][name] for r in rows if r["arm"] == arm]) for arm in arms]
        lines.append(f"| {what}{'' if higher else ' (lower is better)'} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Paired differences",
        "",
        "Mean over seeds of arm minus control, and its 95 % interval.",
        "",
    ]
    lines += [
        "| arm | control | measure | difference | 95 % | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for pair in pairs:
        span = "{:+.3f} to {:+.3f}".format(*pair["interval"]) if pair["interval"] else ""
        lines.append(
            f"| {pair['arm']} | {pair['control']} | {measures[pair['measure']][0]} | {pair['mean']:+.3f} | "
            f"{span} | {pair['verdict']} |"
        )
    return "\n".join([*lines, ""])


def conclusions(pairs: list[dict[str, Any]], measures: dict[str, tuple[str, bool]]) -> list[str]:
    """One sentence for each arm and control."""
    found = []
    for arm, control in dict.fromkeys((pair["arm"], pair["control"]) for pair in pairs):
        those = [pair for pair in pairs if (pair["arm"], pair["control"]) == (arm, control)]
        parts = []
        for verdict in ("better", "worse", "level", "one seed"):
            names = [measures[p["measure"]][0] for p in those if p["verdict"] == verdict]
            if names:
                parts.append(
                    f"{verdict if verdict != 'one seed' else 'not decided by one seed'} in {'; '.join(names)}"
                )
        found.append(
            f"- **{arm}** against {control}: " + ". ".join(part[0].upper() + part[1:] for part in parts) + "."
        )
    return found


def mean_cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def accuracy(rows: list[dict[str, Any]]) -> Any:
    """Accuracy against bits stored: the features at 32 bits a number, and the code."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, (title, code, features) in zip(
        axes,
        (("linear probe", "code_linear", "features_linear"), ("kNN", "code_knn", "features_knn")),
    ):
        for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
            those = [row for row in rows if row["arm"] == arm]
            for name, marker, bits in ((code, "o", those[0]["bits"]), (features, "s", None)):
                values = [row["measures"][name] for row in those]
                at = bits if bits else 32 * those[0].get("features", 256)
                axis.errorbar(
                    at * 1.04 ** (number - 1.5),
                    statistics.mean(values),
                    statistics.stdev(values) if len(values) > 1 else 0,
                    fmt=marker,
                    color=f"C{number}",
                    label=arm if marker == "o" else None,
                    capsize=3,
                )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda bits, _: f"{bits:,.0f}")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend()
    figure.supxlabel("bits stored an image (circles: code, squares: fp32 features)", fontsize=10)
    figure.tight_layout()
    return figure


def differences(pairs: list[dict[str, Any]], measures: dict[str, tuple[str, bool]]) -> Any:
    """Each arm's paired differences and their 95 % intervals, each measure scaled to its largest difference
    and turned so that right is better."""
    keys = list(dict.fromkeys((pair["arm"], pair["control"]) for pair in pairs))
    figure, axes = plt.subplots(1, max(1, len(keys)), figsize=(3.2 * max(1, len(keys)) + 3, 5), sharey=True)
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
