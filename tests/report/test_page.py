"""The page is made, is whole without a network, and a real browser has nothing to complain about.

The run folder below is input for the renderer, shaped like a real one; its figures mean nothing.
"""

import html
import json
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lvssl.commands.arguments import parse
from lvssl.commands.main import main
from lvssl.report.compression import rate_chart
from lvssl.report.figures import COLOURS, MOST_POINTS, Line, line_chart, thinned, ticks
from lvssl.report.figures import chart as with_legend
from lvssl.report.gallery import in_words as bit_in_words
from lvssl.report.page import write_report
from lvssl.report.verdict import (
    Comparison,
    added,
    advice,
    best_code,
    compare,
    compare_codes,
    in_words,
    sampling_noise,
    signed,
)
from lvssl.runs.rows import rows_of_points
from lvssl.runs.run import create_run
from lvssl.settings.fields import to_dict
from lvssl.settings.measure import AnalyseSettings, CompressionSettings, EvaluateSettings
from lvssl.settings.presets import command
from lvssl.settings.pretrain import PretrainSettings, preset
from pipelines.amounts import number_text
from pipelines.errors import InputError

CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "<b>boot</b>",
]

EVALUATION = {
    "run": {"name": "lv", "path": "runs/demo/bernoulli", "family": "bernoulli"},
    "control": {"name": "none", "path": None, "family": "none"},
    "rows": [
        *rows_of_points("lv", 0, [
            ("features", "", 8192, {"linear": 84.75, "knn": 83.9}),
            ("code", "code", 256, {"linear": 83.15, "knn": 82.4}),
            ("code", "code", 256, {
                "raw_pixels": 73.5, "fp32_feature": 32.0, "count": 2000, "nominal_bits": 256,
                "entropy_bits": 241.7, "entropy_per_bit": 0.944, "dead_bits": 3,
                "mean_absolute_correlation": 0.081, "collisions": 7, "information_bound_bits": 130.25,
                "rate_bits": 138.2,
            }),
            ("uncertainty", "", None, {"r_auroc": 0.671, "recall_at_1": 0.803, "aurc": 0.0712}),
        ]),
        *rows_of_points("none", 0, [
            ("features", "", 8192, {"linear": 84.5, "knn": 84.1}),
            ("code", "sign", 256, {"linear": 80.05, "knn": 80.9}),
            ("code", "ITQ", 256, {"linear": 79.5, "knn": 81.9}),
        ]),
        *rows_of_points("random encoder", 0, [("features", "", None, {"linear": 78.55})]),
        *rows_of_points("no encoder", 0, [("pixels", "", None, {"linear": 83.4})]),
    ],
    "data": {"train": 10000, "test": 2000, "resolution": 28},

       "command": "lvssl evaluate runs/demo/bernoulli --test data/fm-test.beton --control runs/demo/none",
}  # fmt: skip

CONFIG = {
    "settings": {
        "data": "data/fashion-mnist-train.beton", "epochs": 8, "batch_size": 256, "temperature": 0.2,
        "seed": 0,
        "preset": "fashion-mnist", "model": {"backbone": "small", "hidden": 256},
        "latent": {"family": "bernoulli", "init_scale": 4.0, "samples": 4, "beta": 0.0,
                   "decorrelation": 0.02},
        "view": {"resolution": 28, "scale": [0.2, 1.0], "mean": [0.286, 0.286, 0.286]},
    },
    "classes": 10,
    "versions": {"lvssl": "0.1.0", "torch": "2.15.0"},
}  # fmt: skip


def write_run(folder, *, control=None, side=28, seed=0):
    """A run folder as pretrain and evaluate leave it."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = json.loads(json.dumps(EVALUATION))
    if control is not None:
        write_metrics(control, generator, rate=False)
        evaluation["control"]["path"] = str(control)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    write_metrics(folder, generator, rate=True)
    labels = generator.integers(0, 10, 120)
    y, x = np.mgrid[:side, :side] / side
    images = [
        np.sin((1 + label) * (x + 0.4 * y) * 5 + phase) for label, phase in zip(labels, generator.random(120))
    ]
    images = np.stack([(120 + 100 * image)[..., None].repeat(3, -1) for image in images]).astype(np.uint8)
    np.savez_compressed(
        folder / "gallery.npz", images=images, labels=labels, class_names=np.array(CLASSES),
        query=np.arange(12),
        neighbours_code=generator.integers(12, 120, (12, 6)), neighbours_feature=generator.integers(12, 120,
        (12, 6)),
        most_certain=np.arange(12, 24), least_certain=np.arange(24, 36),
        uncertainty=np.sort(generator.random(120)),
    )  # fmt: skip
    return folder


def write_analysis(folder, generator, side=28):
    """analysis.json and bits.npz as `lvssl analyse` leaves them."""

    def scores(*names):
        keys = (
            "r_auroc",
            "recall_at_1",
            "aurc",
            "ood noise",
            "ood digits",
            "rank blur",
            "crops less certain",
        )
        return {name: dict(zip(keys, generator.random(7).round(4).tolist())) for name in names}

    bins = [{"confidence": c, "accuracy": c - 0.05, "count": 20} for c in (0.5, 0.7, 0.9)]
    probe = {"accuracy": 83.25, "nll": 0.512, "brier": 0.2231, "ece": 0.0471}
    known = {}
    for target in ("augmentation_{}: crop area", "shapes_{}: hue"):
        known |= {target.format(metric): value for metric, value in (("r2", 0.4), ("mae", 0.1))}
    measured = []
    for name, names in (("lv", ("posterior", "norm")), ("none", ("norm", "distance"))):
        points = [("uncertainty", score, None, found) for score, found in scores(*names).items()]
        points += [("probe", "features", None, probe)]
        points += [(representation, "", None, known) for representation in ("features", "code")]
        measured += rows_of_points(name, 0, points)
    rows = [
        {"bit": d, "on": 0.5, "information_bits": 0.3, "class": CLASSES[9], "auroc": 0.8} for d in range(256)
    ]
    flips = {name: {str(d): 0.25 for d in range(16)} for name in ("replaced", "follows", "same_class")}
    few = {name: {"bits_needed": 4, "auroc": 0.9, "auroc_all": 0.91} for name in CLASSES}
    images = {"train": 4000, "test": 2000}
    analysis = {"run": {"name": "lv"}, "control": {"name": "none"}, "rows": measured, "images": images,
                "reliability": {"lv": {"features": bins}}, "command": "lvssl analyse runs/demo",
                "bits": {"table": rows, "flips": flips, "few": few}}  # fmt: skip
    (folder / "analysis.json").write_text(json.dumps(analysis))
    images = generator.integers(0, 256, (40, side, side, 3), dtype=np.uint8)
    np.savez_compressed(
        folder / "bits.npz", images=images, labels=generator.integers(0, 10, 40),
        class_names=np.array(CLASSES), bits=np.arange(48), on=generator.integers(0, 40, (48, 8)),
        off=generator.integers(0, 40, (48, 8)),
    )  # fmt: skip
    return folder


def write_compression(folder):
    """compression.json as `lvssl compression` leaves it."""
    rows = [
        row
        for i, method in enumerate(("code, first bits", "code", "", "LSH", "ITQ"))
        for bits in ((64, 256) if method else (8192,))
        for row in rows_of_points("bernoulli", 0, [("code" if method else "features", method, bits, {
            "linear": 60 + bits / 64 + i, "knn": 61.5 + i, "map_over_hits": 0.4 + i / 100,
            "raw_pixels": 6272 / bits,
        })])
    ]  # fmt: skip
    content = {"rows": rows, "left_out": ["PQ, 2 bits: <too short>"], "queries": 2000, "database": 10_000}
    content |= {"top_n": 1000, "command": "lvssl compression runs/demo"}
    (folder / "compression.json").write_text(json.dumps(content))
    return folder


def write_metrics(folder, generator, rate):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for step in range(10, 321, 10):
        t = 1 - math.exp(-step / 90)
        row = {
            "step": step,
            "epoch": step / 39,
            "loss": 6.2 - 2.4 * t,
            "ntxent": 6.0 - 2.2 * t + 0.1 * generator.random(),
        }
        row |= {"images_per_second": 560 + 30 * generator.random(), "lr": 0.002 * (1 - step / 320)}
        row |= {"rate_bits": 40 + 98 * t} if rate else {}
        if step % 20 == 0:  # some rows lack some keys
            row |= {
                "probe_features": 50 + 30 * t + generator.random(),
                "probe_code": 45 + 31 * t + generator.random(),
            }
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """The visible text, what is loaded, and whether every tag is closed."""

    VOID = {"meta", "link", "img", "br", "path", "circle"}

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.loaded, self.ids, self.targets = [], [], [], set(), []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loaded += [
            v for k, v in attributes.items() if k in ("src", "data", "srcset") or (tag, k) == ("link", "href")
        ]
        self.targets += [attributes["href"]] if tag == "a" else []
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag == "path":  # one with a <title>
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)


@pytest.fixture
def page(tmp_path):
    run = write_run(tmp_path / "bernoulli", control=tmp_path / "none")
    path = write_report(run)
    assert path == run / "report.html"
    return path


def test_page_is_whole_and_says_every_figure(page):
    html = page.read_text()
    parsed = Page(html)
    assert parsed.loaded and all(source.startswith("data:") for source in parsed.loaded)
    assert not re.search(r"https?:|@import|url\(", html)
    assert len(html) < 10e6
    text = " ".join(" ".join(parsed.text).split())
    for value in ("84.8", "83.2", "82.4", "84.5", "84.1", "80.0", "80.9", "78.5", "83.4", "256", "8,192",
                  "73.5", "32.0",
                  "241.7", "0.081", "130.2", "0.671", "0.803", "0.071", "10,000", "fashion-mnist", "0.02",
                  "2.15.0",
                  EVALUATION["command"], *CLASSES):  # fmt: skip
        assert value in text, value
    assert "The code is ahead of the control's codes of 256 bits in the linear probe (+3.1, against" in text
    assert "and level with them in kNN (+0.5, against ITQ)." in text
    assert "Use the run's own 256-bit code. Over the best control the latent adds" in text
    assert "The features are level with the control's" in text
    assert set(parsed.targets) == {f"#{id}" for id in parsed.ids if f"#{id}" in parsed.targets}
    assert {"results", "curves", "neighbours", "certainty", "codes", "settings", "commands"} <= parsed.ids
    assert html.count('class="line control"') == 2 * 2  # loss and probes, each with its legend
    assert [p.name for p in page.parent.glob(".*")] == []


def test_wrong_neighbours_are_marked_by_more_than_colour(page):
    g = np.load(page.parent / "gallery.npz")
    html = page.read_text()
    found = np.concatenate([g["neighbours_code"], g["neighbours_feature"]], axis=1)
    wrong = int((g["labels"][found] != g["labels"][g["query"]][:, None]).sum())
    assert (
        0
        < wrong
        == html.count('class="pic wrong"')
        == html.count('(another class)" loading')
        == html.count(">≠ ")
    )


def test_sections_without_their_file_are_dropped(tmp_path):
    run = write_run(tmp_path / "run")
    for name, section in (
        ("gallery.npz", "neighbours"),
        ("metrics.jsonl", "curves"),
        ("evaluation.json", "results"),
    ):
        (run / name).unlink()
        parsed = Page(write_report(run).read_text())
        assert section not in parsed.ids and f"#{section}" not in parsed.targets
        assert all(target[1:] in parsed.ids for target in parsed.targets)
    assert "Not evaluated yet" in " ".join(parsed.text)


def test_codes_are_compared_before_the_run_is_evaluated(tmp_path):
    run = write_compression(write_run(tmp_path / "run"))
    (run / "evaluation.json").unlink()
    text = " ".join(" ".join(Page(write_report(run).read_text()).text).split())
    assert "The code is level with the control's codes of 64 bits in kNN (−3.0, against ITQ)" in text
    assert "One seed, 2,000 test images" in text and "Not evaluated yet" in text


def test_what_was_not_measured_is_named_with_its_command(tmp_path):
    run = write_run(tmp_path / "run")
    for stage in ("compression", "analyse"):
        assert f"lvssl {stage} {run}" in write_report(run).read_text()
    assert f"lvssl evaluate {run}</code>" not in write_report(run).read_text()
    (run / "evaluation.json").unlink()
    assert f"lvssl evaluate {run}</code>" in write_report(run).read_text()


def test_the_page_is_named_after_run_and_data_set_rather_than_a_file(tmp_path):
    run = write_run(tmp_path / "lv")
    for name in ("test-00000-of-00001.parquet", "test", None):
        data = EVALUATION["data"] | {"name": name}
        (run / "evaluation.json").write_text(json.dumps(EVALUATION | {"data": data}))
        html = write_report(run).read_text()
        assert "<title>lv · bernoulli · fashion-mnist</title>" in html
        assert "<h1>256-bit codes of fashion-mnist</h1>" in html


def test_without_a_control_nothing_is_claimed(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(EVALUATION | {"control": None}))
    text = " ".join(Page(write_report(run).read_text()).text)
    assert "No control was evaluated" in text and "ahead" not in text


def test_a_damaged_result_without_its_number_of_test_images_opens_and_compares_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    for data in ({}, {"test": None}):
        (run / "evaluation.json").write_text(json.dumps(EVALUATION | {"data": data}))
        text = " ".join(Page(write_report(run).read_text()).text)
        assert "test images: a difference up to" not in text


def test_a_result_without_an_entry_is_a_page_or_a_line_that_names_it(tmp_path):
    """Each entry, and each entry within one or within the first row, is left out; the former also null."""
    run = write_run(tmp_path / "run", side=4)
    write_analysis(write_compression(run), np.random.default_rng(0), side=4)
    (run / "metrics.jsonl").unlink()  # its curves, half of a page's time, depend on none of these results
    refused = set()
    for path in map(run.joinpath, ("evaluation.json", "analysis.json", "compression.json")):
        whole = path.read_text()
        places = [(name,) for name in json.loads(whole)]
        for name, value in json.loads(whole).items():
            inside = value if isinstance(value, dict) else value[0] if name == "rows" else ()
            places += [(name, *([0] if name == "rows" else []), key) for key in inside]
        for place in places:
            for null in (False, True) if len(place) == 1 else (False,):
                content = json.loads(whole)
                *outer, last = place
                where = content
                for key in outer:
                    where = where[key]
                where.pop(last)
                where |= {last: None} if null else {}
                path.write_text(json.dumps(content))
                try:
                    write_report(run)
                except InputError as error:
                    assert re.fullmatch(rf"{path}: not a result \(.*\); remove it", str(error))
                    refused.add((path.stem, *place))
        path.write_text(whole)
    wanted = [("evaluation", "run"), ("evaluation", "control", "name"), ("analysis", "images", "test")]
    assert refused >= {*wanted, ("compression", "rows", 0, "value"), ("compression", "queries")}
    assert ("evaluation", "data") not in refused


def test_settings_left_out_show_the_value_in_force(tmp_path):
    chosen = preset("cifar10-small")
    chosen = replace(chosen, latent=replace(chosen.latent, beta=0.5))
    run = write_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text()) | {"settings": to_dict(chosen)}
    (run / "config.json").write_text(json.dumps(config))
    text = " ".join(Page(write_report(run).read_text()).text)
    assert "latent.variance 5 (default)" in text and "latent.covariance 1 (default)" in text
    assert "latent.sample_reduction samples (default)" in text
    assert "latent.beta 0.5" in text and "latent.beta 0.5 (default)" not in text


def test_a_result_of_before_the_controls_codes_opens_and_says_what_it_lacks(tmp_path):
    run = write_run(tmp_path / "run")
    rows = [row for row in EVALUATION["rows"] if row["method"] != "ITQ"]
    (run / "evaluation.json").write_text(json.dumps(EVALUATION | {"rows": rows}))
    text = " ".join(Page(write_report(run).read_text()).text)
    assert (
        "(+1.5, against sign)" in text and "Only the control's sign bits were measured: --overwrite" in text
    )
    (run / "evaluation.json").write_text(json.dumps(EVALUATION | {"left_out": ["OPQ needs faiss"]}))
    text = " ".join(Page(write_report(run).read_text()).text)
    assert "Not measured: OPQ needs faiss." in text and "sign bits were measured" not in text


def test_the_results_say_how_they_were_measured(tmp_path):
    run = write_run(tmp_path / "run")
    assert "kNN: 20 neighbours" in write_report(run).read_text()  # of older versions, which don't say
    protocol = {"linear": "sgd: Adam, 10 epochs", "knn": {"k": 200, "temperature": 0.1}}
    (run / "evaluation.json").write_text(json.dumps(EVALUATION | {"protocol": protocol}))
    text = " ".join(" ".join(Page(write_report(run).read_text()).text).split())
    assert "Linear: sgd: Adam, 10 epochs. kNN: 200 neighbours, by cosine" in text


def test_missing_values_show_as_a_dash_and_large_pictures_shrink(tmp_path):
    run = write_run(tmp_path / "run", side=224)
    unknown = {"r_auroc": float("nan"), "recall_at_1": None}
    rows = [row | {"value": unknown.get(row["metric"], row["value"])} for row in EVALUATION["rows"]]
    evaluation = EVALUATION | {"rows": rows}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    html = write_report(run).read_text()
    assert (
        html.count('<td class="n" data-csv="">–</td>') == 2 + 2 + 2
    )  # bits, kNN of the baselines; the two above
    assert "nan" not in "".join(Page(html).text) and len(html) < 3e6


def test_bad_input_is_named_and_the_old_page_stays(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "missing")
    with pytest.raises(InputError, match="is not a run folder"):
        write_report(tmp_path)
    run = write_compression(write_run(tmp_path / "run"))
    before = write_report(run).read_text()
    good = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(good + '{"step": 330, "nt')  # cut short by a kill
    assert write_report(run).read_text() == before
    gallery = dict(np.load(run / "gallery.npz"))
    for name, content, message in [
        ("config.json", '{"settings": [], "classes": 2}', "config.json: settings by name are expected"),
        ("config.json", "[1]", "config.json: not a run's configuration"),
        ("config.json", '{"settings": {"latent": 3}, "classes": 2}', "config.json.latent: settings by name"),
        ("metrics.jsonl", good.replace("\n", "\n{oops\n", 1), "metrics.jsonl: line 2"),
        ("evaluation.json", '{"run": ', "evaluation.json: not a result (Expecting value"),
        ("evaluation.json", "[1]", "evaluation.json: not a result (an object is expected, not list"),
        ("evaluation.json", '{"run": 3}', "evaluation.json: not a result (run: an object"),
        ("evaluation.json", json.dumps(EVALUATION | {"left_out": 3}), "not a result (left_out: a list"),
        ("compression.json", '{"rows": {"a": 1}}', "compression.json: not a result (rows: a list"),
        ("gallery.npz", b"PK\x03\x04 cut", "gallery.npz: can't be read"),
        ("gallery.npz", {"query": np.array([120])}, "gallery.npz: query points outside the 120 images"),
        ("gallery.npz", {"images": gallery["images"][..., 0]}, "gallery.npz: images must be"),
        ("gallery.npz", {"labels": gallery["labels"] + 5}, "gallery.npz: labels point outside the 10"),
    ]:  # fmt: skip
        kept = (run / name).read_bytes()
        if isinstance(content, dict):
            np.savez(run / name, **(gallery | content))
        else:
            (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=re.escape(message)) as error:
            write_report(run)
        assert "\n" not in str(error.value)
        (run / name).write_bytes(kept)
        assert (run / "report.html").read_text() == before


def test_a_damaged_analysis_is_named(tmp_path):
    run = write_analysis(write_run(tmp_path / "run"), np.random.default_rng(1))
    assert "<b>boot</b>" not in write_report(run).read_text()  # class names are escaped everywhere
    (run / "bits.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(InputError, match=r"bits.npz: can't be read .* run `lvssl analyse` again"):
        write_report(run)
    (run / "analysis.json").write_text("[]")
    with pytest.raises(InputError, match=r"analysis.json: not a result .an object"):
        write_report(run)


def test_the_largest_page_stays_below_ten_megabytes(tmp_path):
    generator = np.random.default_rng(0)
    run = write_analysis(write_run(tmp_path / "run"), generator, side=224)
    gallery = dict(np.load(run / "gallery.npz"))
    labels, noise = (
        generator.integers(0, 10, 600),
        generator.integers(0, 256, (600, 14, 14, 3), dtype=np.uint8),
    )
    images = noise.repeat(16, axis=1).repeat(16, axis=2)
    gallery |= {"images": images, "labels": labels, "uncertainty": generator.random(600),
                "query": np.arange(40), "neighbours_code": generator.integers(40, 600, (40, 6)),
                "neighbours_feature": generator.integers(40, 600, (40, 6))}  # fmt: skip
    np.savez(run / "gallery.npz", **gallery)
    assert write_report(run).stat().st_size < 10e6


def test_rate_and_accuracy_are_drawn(tmp_path):
    run = write_compression(write_run(tmp_path / "run"))
    html = write_report(run).read_text()
    parsed = Page(html)
    assert "bits-stored" in parsed.ids and "#bits-stored" in parsed.targets
    assert html.count("<title>bernoulli: code</title>") == 3  # a line in each chart, its first bits joined on
    assert html.count("<title>bernoulli: ITQ</title>") == 3 and "&lt;too short&gt;" in html
    assert 'data-csv="24.5"' in html and "lvssl compression runs/demo" in html
    text = " ".join(" ".join(parsed.text).split())
    assert "The code is level with the control's codes of 256 bits in kNN (−3.0, against ITQ)" in text


@pytest.mark.parametrize(("lengths", "marks"), [
    ((16, 64, 2048), ["16", "64"]), ((32, 2048), ["32", "2,048"]), ((48, 24_576), ["48", "24,576"]),
])  # fmt: skip
def test_lengths_are_marked_in_bits_and_not_by_their_logarithms(lengths, marks):
    rows = [{"run": "a", "method": "code", "bits": bits, "knn": 50.0 + bits / 100} for bits in lengths]
    figure = rate_chart(rows, "knn", "%")
    assert figure is not None
    assert re.findall(r"<text[^>]*>([^<]*)</text>", figure.drawing)[: len(marks)] == marks


def test_every_command_on_the_page_parses_to_what_it_was_made_from(tmp_path):
    """The settings of a run that is far from its preset, and those of the commands that are still to come."""
    settings = replace(
        preset("folder-r50"),
        data=tmp_path / "it's here",
        out=tmp_path / "a run",
        model=replace(preset("folder-r50").model, backbone="small"),
        view=replace(preset("folder-r50").view, resolution=64, scale=(0.3, 1.0)),
        latent=replace(preset("folder-r50").latent, family="gaussian", beta=0.5),
    )
    create_run(settings, 2, resume=False)
    made = AnalyseSettings(settings.out, test=tmp_path / "t.beton", alone=True, samples=3, on_error="skip")
    (settings.out / "analysis.json").write_text(json.dumps({"rows": [], "command": command("analyse", made)}))
    page = write_report(settings.out).read_text()
    texts = re.findall(r"<(?:code|pre)[^>]*>(.*?)</(?:code|pre)>", page, re.S)
    lines = {html.unescape(line) for text in texts for line in text.splitlines() if line.startswith("lvssl ")}
    found = {shlex.split(line)[1]: shlex.split(line)[2:] for line in lines}
    assert len(lines) == len(found) == 5
    assert parse(PretrainSettings, found["pretrain"], "", preset("folder-r50")) == settings
    assert parse(AnalyseSettings, found["analyse"], "") == made
    for name, kind in (("evaluate", EvaluateSettings), ("compression", CompressionSettings)):
        assert parse(kind, found[name], "") == kind(settings.out)
    assert main(["report", *found["report"]]) == 0


# The verdict and the charts -------------------------------------------------------------------------------


def test_verdict_by_hand():
    noise = sampling_noise(80, 80, 2000)
    assert noise == pytest.approx(2 * math.sqrt(2 * 0.8 * 0.2 / 2000) * 100)  # 2.53 points
    assert [Comparison("m", 80 + d, 80, 2.53).outcome for d in (2.6, 2.5, -2.5, -2.6)] == [
        "better",
        "level",
        "level",
        "worse",
    ]
    rows = [Comparison("kNN", 83, 80, 2.5), Comparison("probe", 79.9, 80, 2.5)]
    assert in_words(rows, "The code", "the sign bits") == (
        "The code is ahead of the sign bits in kNN (+3.0) and level with them in probe (−0.1)."
    )
    assert (signed(-0.04), signed(0.25), signed(-1)) == ("0.0", "+0.2", "−1.0")


def test_the_strongest_control_of_as_many_bits_is_the_one_compared():
    def row(method, bits, knn, linear):
        kind = "code" if method else "features"
        return rows_of_points("r", 0, [(kind, method, bits, {"knn": knn, "linear": linear})])

    code = row("code", 256, 80.0, 80.0)
    rows = row("code, first bits", 64, 99, 99) + row("", 8192, 99, 99) + row("sign", 256, 70, 79)
    rows += row("ITQ", 256, 81, 70) + row("PCA + sign", 512, 99, 99)
    found = compare_codes({"rows": code + rows, "queries": 10_000})
    assert [(c.measure, c.method, c.control, c.outcome) for c in found] == [
        ("kNN", "ITQ", 81, "level"), ("linear probe", "sign", 79, "level"),
    ]  # fmt: skip
    assert compare_codes({"rows": rows, "queries": 1}) == [] == compare_codes({})


def test_codes_of_different_length_are_not_compared():
    found = compare(EVALUATION)
    assert [(c.measure, round(c.difference, 2)) for c in found["code"]] == [
        ("kNN", 0.5),
        ("linear probe", 3.1),
    ]
    rows = [row | {"bits": 2048} if row["method"] in ("sign", "ITQ") else row for row in EVALUATION["rows"]]
    longer = EVALUATION | {"rows": rows}
    assert compare(longer)["code"] == [] and compare(longer)["features"]


def test_figures_are_readable_at_any_size():
    line = Line("run", "run", [(1.0, 3.0), (2.0, 29_104.4)])
    assert with_legend("Speed", "images per second", [line]).legend[0].value == "29,104"
    for value, said in ((0.123456, "0.1235"), (999.96, "1000"), (-1234.5, "-1,234"), (3e38, "3e+38")):
        assert number_text(value, 4) == said
    row = {"bit": 3, "on": 0.5, "information_bits": 0.1, "class": "a", "auroc": 0.6}
    flips = {"replaced": {"3": 0.1}, "same_class": {"3": -0.0004}, "follows": {"3": 0.2}}
    assert "changes by 0.0 points" in bit_in_words(row, flips)
    flips["same_class"] = dict.fromkeys(flips["same_class"], -0.031)
    assert "changes by −3.1 points" in bit_in_words(row, flips)  # the sign that the page has elsewhere


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.71, 6.02), (5, 5), (0, 0), (-3, 100000), (0.001, 0.0011), (44.9, 80.3)]
)
def test_ticks_are_round_and_enclose(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    assert len({number_text(t) for t in found}) == len(found)
    assert (low, high) != (0, 0) or found[-1] == 1


def test_a_chart_takes_colours_and_font_from_the_page_and_shares_no_id_with_another():
    lines = [Line("a < b", "run", [(0.0, 1.0), (10.0, 2.5)]), Line("c", "control", [(5.0, 1200.0)])]
    charts = [line_chart(lines, "step", title) for title in ("Loss & more", "Rate")]
    assert charts[0] == line_chart(lines, "step", "Loss & more")  # the same figures give the same page
    ids = [set(re.findall(r'id="([^"]+)"', chart)) for chart in charts]
    assert ids[0] and not ids[0] & ids[1]
    for chart in charts:
        assert not re.search(r"#[0-9a-f]{6};|font|https?:|url\(|<style", chart)
        used = set(re.findall(r"var\(--(\w+)\)", chart))
        assert used == {"run", "control", "rule", "soft"} < set(COLOURS)
        assert set(re.findall(r'href="#([^"]+)"', chart)) <= set(re.findall(r'id="([^"]+)"', chart))
    assert 'aria-label="Loss &amp; more"' in charts[0] and "<title>a &lt; b</title>" in charts[0]
    assert ">1,000<" in charts[0] and ">step<" in charts[0]


def test_long_lines_are_thinned_to_their_means():
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    short = thinned(points)
    assert len(short) <= MOST_POINTS + 1 and short[-1] == points[-1]
    assert all(abs(v - 0.5) < 0.05 for _, v in short[:-2])


# A real browser -------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Runs in the page, after its own script: chooses an image and a bit, presses every CSV button, catching what
# would be downloaded.
PRESS = """
<script>
const caught = [];
URL.createObjectURL = (blob) => { caught.push(blob); return "data:,"; };
HTMLAnchorElement.prototype.click = function () {};
const shown = (explorer) => [...explorer.querySelectorAll(".card")].map((card) => card.offsetHeight > 0);
const explorers = [...document.querySelectorAll(".explorer")].map((explorer) => {
  const before = shown(explorer);
  explorer.querySelectorAll(".pick")[2].click();
  return {before, after: shown(explorer), pressed: explorer.querySelectorAll("[aria-pressed=true]").length};
});
document.querySelectorAll("button[data-table]").forEach((button) => button.click());
Promise.all(caught.map((blob) => blob.text())).then((texts) => {
  const broken = [...document.images].filter((image) => !image.naturalWidth).length;
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify({texts, explorers, broken, wide, images: document.images.length});
  document.body.append(found);
});
</script>
</body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 500])  # 500: the narrowest window that headless Chromium makes
def test_in_chromium(page, tmp_path, width):
    write_compression(write_analysis(page.parent, np.random.default_rng(1)))
    write_report(page.parent)
    page.write_text(page.read_text().replace("</body>", PRESS).replace('loading="lazy"', ""))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ]
    flags += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=4000"]
    flags += [
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
    ]
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = json.loads(
        re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]
        .replace("&gt;", ">")
        .replace("&lt;", "<")
    )
    assert found["broken"] == 0 and found["images"] > 100 and not found["wide"]
    assert len(found["explorers"]) == 2
    for explorer in found["explorers"]:
        assert [i for i, is_shown in enumerate(explorer["before"]) if is_shown] == [0]
        assert [i for i, is_shown in enumerate(explorer["after"]) if is_shown] == [2]
        assert explorer["pressed"] == 1
    results = next(text for text in found["texts"] if text.startswith("Model,"))
    assert results.splitlines()[:2] == [
        "Model,Representation,Bits,Linear %,kNN %",
        "bernoulli,features,8192,84.75,83.9",
    ]
    assert len(found["texts"]) == 10 and "Compression,value\r\nsmaller than raw pixels,73.5\r\n" in "".join(
        found["texts"]
    )


def test_the_page_of_a_run_without_labels_names_what_needs_none(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/evaluation.json").unlink()
    for classes, named in ((10, "lvssl evaluate "), (0, "lvssl curate ")):
        (tmp_path / "run/config.json").write_text(json.dumps(CONFIG | {"classes": classes}))
        text = html.unescape(write_report(tmp_path / "run").read_text())
        assert named in text and ("lvssl evaluate" in text) == (classes > 1)
        assert ("What you can do with this run" in text) == (classes == 0)


def test_the_first_sentence_says_what_to_use():
    level = Comparison("linear probe", 80, 80.5, 1.5, method="OPQ")
    code = [Comparison("kNN", 80, 78, 1.5, method="ITQ"), level]
    assert advice(best_code(code, 64, "c"), {}) == "Use the run's own 64-bit code."
    worse = [Comparison("kNN", 70, 79, 1.5, method="PCA + sign"), level]
    assert advice(best_code(worse, 64, "a b"), {}) == (
        "Take the control's PCA + sign for kNN (lvssl encode 'a b' --images DIR --bits 64 --code pca): "
        "the run's own 64-bit code is behind."
    )
    both = [worse[0], Comparison("linear probe", 70, 79, 1.5, method="LSH")]
    assert "(lvssl encode runs/c --images" in best_code(
        worse, 64, str(Path.cwd() / "runs/c")
    )  # as typed here
    assert ") and LSH for the linear probe: the run's own" in best_code(both, 64, "c")
    assert best_code([], 64, "c") == "" == added({"code": [], "features": []})
    features = [Comparison("kNN", 80, 78, 1.5)]
    assert added({"code": worse, "features": features}) == (
        "Over the best control the latent adds 2.0 points in kNN of the features; "
        "it costs 9.0 points in kNN of the code."
    )
    assert added({"code": [level], "features": []}) == "Over the best control the latent adds nothing."
    scores = {
        "density": {"r_auroc": 0.55, "ood noise": 0.9, "ood digits": 0.7},
        "norm": {"r_auroc": 0.52, "ood noise": 0.99, "ood digits": 0.1},
        "supervised": {"r_auroc": 0.99, "ood noise": 1.0, "ood digits": 1.0},  # it saw labels
    }
    points = [("uncertainty", method, None, figures) for method, figures in scores.items()]
    said = advice("", {"run": {"name": "a"}, "rows": rows_of_points("a", 0, points)})
    foreign, wrong = said.split("; ")
    assert foreign == "Trust the density for foreign images (AUROC 0.80)"
    assert wrong == "no score finds wrong neighbours (AUROC 0.55)."
    assert advice("", {}) == ""
