"""The analysis of real runs: what it says agrees with what a dozen plain lines compute from the networks."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from lvssl.evaluation.analyse import analyse
from lvssl.evaluation.embedding import embed
from lvssl.evaluation.factors import augmented
from lvssl.evaluation.outputs import network_outputs
from lvssl.evaluation.regression import ridge_each
from lvssl.evaluation.scorer import Distance, UncertaintyScorer, severity_correlation
from lvssl.evaluation.uncertainty import r_auroc
from lvssl.models.inference import BATCH
from lvssl.report.page import write_report
from lvssl.report.verdict import auroc_error
from lvssl.runs.rows import POINT, by_point
from lvssl.runs.run import load_run
from lvssl.settings.measure import AnalyseSettings
from lvssl.settings.pretrain import preset
from lvssl.training.pretrain import pretrain
from pipelines.datasets.dataset import evenly_spaced
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.loader import evaluation_crops


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    base = dataclasses.replace(preset("digits"), data=digits["train"], epochs=2, threads=1)
    for family, name in (("none", "control"), ("bernoulli", "lv")):
        latent = dataclasses.replace(base.latent, family=family)
        pretrain(dataclasses.replace(base, out=folder / name, latent=latent))
    return folder


@pytest.fixture(scope="module")
def analysis(runs):
    return analyse(AnalyseSettings(runs / "lv", max_images=150, samples=3))


def test_every_score_of_every_model_is_there(analysis, runs):
    assert json.loads((runs / "lv" / "analysis.json").read_text()) == json.loads(json.dumps(analysis))
    models = {"run": "lv", "control": "control"}
    assert {role: analysis[role]["name"] for role in models} == models
    scores = {name: measured(analysis, name, "uncertainty") for name in models.values()}
    deterministic = {"norm", "distance", "density", "probe"}
    assert set(scores["control"]) == deterministic
    assert set(scores["lv"]) == deterministic | {"posterior", "rate", "samples"}
    columns = {"r_auroc", "recall_at_1", "aurc", "crops less certain"}
    columns |= {f"ood {name}" for name in ("noise", "textures", "digits")}
    columns |= {f"rank {name}" for name in ("blur", "noise", "jpeg", "occlusion", "crop")}
    for name in models.values():
        assert all(set(row) - {*POINT} == columns for row in scores[name].values())
        for representation in ("features", "code"):
            found = measured(analysis, name, representation)[""]
            assert {"shapes_r2: hue", "shapes_mae: hue", "augmentation_r2: crop area"} <= set(found)
    assert (
        set(measured(analysis, "lv", "probe"))
        == set(analysis["reliability"]["lv"])
        == {"features", "latent mean", "latent samples"}
    )
    assert len(analysis["bits"]["table"]) == 64 and analysis["command"].startswith("lvssl analyse")


def measured(analysis, run, representation):
    points = by_point(analysis["rows"], run=run, representation=representation)
    return {point["method"]: point for point in points}


def test_figures_agree_with_the_embedding(analysis, runs, digits):
    run, test = load_run(runs / "lv"), open_reader(digits["test"])
    whole = embed(run.network, test, run.settings.view)
    chosen = evenly_spaced(len(test), 150)
    outputs = network_outputs(
        run.network, evaluation_crops(test, run.settings.view, chosen), run.settings.view
    )
    assert np.allclose(outputs.features, whole.features[chosen], atol=1e-4)
    assert np.allclose(outputs.uncertainty, whole.uncertainty[chosen], rtol=1e-4)
    assert (np.packbits(outputs.bits, axis=1, bitorder="little") == whole.codes[chosen]).mean() > 0.999
    expected = r_auroc(outputs.features, test.labels[chosen], outputs.uncertainty)
    assert measured(analysis, "lv", "uncertainty")["posterior"]["r_auroc"] == pytest.approx(expected.r_auroc)
    table = {row["bit"]: row for row in analysis["bits"]["table"]}
    assert [table[d]["on"] for d in range(64)] == pytest.approx(outputs.bits.mean(axis=0))
    information = [row["information_bits"] for row in analysis["bits"]["table"]]
    assert information == sorted(information, reverse=True)


def test_samples_are_averaged_as_probabilities(runs, digits):
    run, train = load_run(runs / "lv"), open_reader(digits["train"])
    view, chosen = run.settings.view, evenly_spaced(len(train), 200)
    pixels = evaluation_crops(train, view, chosen)
    first = network_outputs(run.network, pixels, view, samples=4, seed=3)
    assert first.samples.shape == (4, 200, 64) and set(np.unique(first.samples)) == {-1, 1}
    again = network_outputs(run.network, pixels, view, samples=4, seed=3)
    assert (first.samples == again.samples).all()
    same = network_outputs(run.network, np.repeat(pixels[:1], BATCH + 1, axis=0), view, samples=1, seed=3)
    assert len(np.unique(same.samples[0], axis=0)) == BATCH + 1  # noise of its own for each, in every batch
    scorer = UncertaintyScorer(True, first, train.labels[chosen])
    expected = sum(scorer.latent_probe.probabilities(first.samples[k]) for k in range(4)) / 4
    assert np.allclose(scorer.predictions(first)["latent samples"], expected)
    control = load_run(runs / "control")
    assert network_outputs(control.network, pixels, view, samples=4).samples.shape[0] == 0


def test_distance_is_the_cosine_distance_of_standardised_features_to_the_nearest(runs, digits):
    run, train = load_run(runs / "control"), open_reader(digits["train"])
    outputs = network_outputs(
        run.network, evaluation_crops(train, run.settings.view, np.arange(60)), run.settings.view
    )
    h = outputs.features
    z = (h - h[:40].mean(axis=0)) / np.where(h[:40].std(axis=0) > 0, h[:40].std(axis=0), 1)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    assert Distance(h[:40])(h) == pytest.approx(1 - (z @ z[:40].T).max(axis=1), abs=1e-5)


def test_augmentation_targets_belong_to_their_views(runs, digits):
    run, train = load_run(runs / "lv"), open_reader(digits["train"])
    outputs, targets = augmented(run, train, 300, seed=0)
    assert len(outputs.features) == 300 and all(len(column) == 300 for column in targets.values())
    low, high = run.settings.view.scale
    assert low * 0.8 <= targets["crop area"].min() and targets["crop area"].max() <= high
    # A brighter view is brighter: its parameter must be found in the pixels' features, out of sample.
    h, true = outputs.features, targets["brightness"]
    shuffled = np.random.default_rng(0).permutation(true)
    parts = [{"found": true[rows], "chance": shuffled[rows]} for rows in (slice(200), slice(200, None))]
    scores = ridge_each(h[:200], parts[0], h[200:], parts[1])
    assert scores["found"].r2 > scores["chance"].r2


def test_severity_correlation_against_scipy():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(6, 40)) + np.arange(6)[:, None] * 0.3
    scores[:, 1] = 2.0  # never changes
    scores[:3, 2] = scores[0, 2]  # ties
    expected = [0 if j == 1 else spearmanr(scores[:, j], np.arange(6)).statistic for j in range(40)]
    assert severity_correlation(scores) == pytest.approx(np.mean(expected))


def test_auroc_error_against_the_bootstrap():
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(1)
    areas = []
    for _ in range(300):
        scores = np.concatenate([generator.normal(0.8, 1, 120), generator.normal(0, 1, 80)])
        areas.append(roc_auc_score(np.arange(200) < 120, scores))
    assert auroc_error(float(np.mean(areas)), 0.6, 200) == pytest.approx(np.std(areas), rel=0.2)


def test_the_page_shows_it(analysis, runs):
    html = write_report(runs / "lv").read_text()
    for section in ("uncertainty", "bits", "regression"):
        assert f'id="{section}"' in html and f'href="#{section}"' in html
    posterior = measured(analysis, "lv", "uncertainty")["posterior"]
    assert f'data-csv="{posterior["r_auroc"]}"' in html and analysis["command"] in html
    assert html.count('class="pick bit"') == html.count('class="card bit-card"') == 48


def test_pictures_of_bits_are_larger_than_what_the_network_reads(runs, digits, tmp_path):
    source = open_reader(digits["test"])
    for i in range(48):
        path = tmp_path / "test" / str(source.labels[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.encoded(0, i)).resize((40, 44)).save(path)
    large, path = open_reader(tmp_path / "test"), tmp_path / "out/bits.npz"
    path.parent.mkdir()
    analyse(AnalyseSettings(runs / "lv", test=tmp_path / "test", alone=True, samples=1, out=path.parent))
    with np.load(path) as file:
        images, labels, on = file["images"], file["labels"], file["on"]
    assert images.shape[1:] == (40, 40, 3) and on.max() < len(images) == len(labels)
    view = dataclasses.replace(load_run(runs / "lv").settings.view, resolution=40)
    crops = evaluation_crops(large, view, np.arange(48))
    for image, label in zip(images, labels):
        assert (crops[large.labels == label] == image).all(axis=(1, 2, 3)).any()


def test_bad_calls_are_named(runs, digits, tmp_path):
    with pytest.raises(InputError, match="at least 40 test images"):
        analyse(AnalyseSettings(runs / "lv", max_images=10))
    with pytest.raises(InputError, match="--seed must be at least 0, got -1"):
        analyse(AnalyseSettings(runs / "lv", seed=-1))
    with pytest.raises(InputError, match="--alone and --control contradict each other"):
        analyse(AnalyseSettings(runs / "lv", alone=True, control=runs / "control"))
    with pytest.raises(InputError, match="no such run"):
        analyse(AnalyseSettings(tmp_path / "nothing"))
    with pytest.raises(InputError, match="nothing"):
        analyse(AnalyseSettings(runs / "lv", test=tmp_path / "nothing.beton"))


def test_the_same_twice(analysis, runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")  # its file would take the place of the other tests'
    torch.manual_seed(123)
    np.random.seed(5)
    again = analyse(AnalyseSettings(tmp_path / "runs" / "lv", max_images=150, samples=3, overwrite=True))
    assert json.dumps(analysis["rows"]) == json.dumps(again["rows"])
