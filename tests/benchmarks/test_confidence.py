"""The candidates for a score of confidence: agreement, augmented views, the tables in docs/."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from benchmarks import confidence
from lvssl.settings.pretrain import preset
from pipelines.decode import open_reader
from pipelines.loader import LoaderSettings, TwoViewLoader, evaluation_crops

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_that_stand_in_the_documents_are_those_of_the_kept_rows(capsys):
    confidence.main(["--print", "--json", str(ROOT / "docs/confidence.json")])
    page, tables = (ROOT / "docs/uncertainty.md").read_text(), capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 3 and all(table in page for table in tables)


def test_a_gain_is_over_the_better_control_of_the_seed():
    rows = json.loads((ROOT / "docs/confidence.json").read_text())["rows"]
    asked = [
        row for row in rows if row["asked"] == "test" and row["data"] == "cifar10-jpeg" and row["seed"] == 0
    ]
    of = {(row["family"], row["score"]): row for row in asked}
    best = max(of[name, "distance 20"]["training"] for name in ("none", "sign"))
    gain = of["bernoulli", "distance"]["training"] - best
    assert confidence.goals(asked, "cifar10-jpeg", "bernoulli", 0)[2] == f"{gain:+.3f}"


def test_rows_are_there_only_for_the_same_images_and_foreign_sets():
    sets = {f"foreign {name}": 0.5 for name in (*confidence.OUT_OF_DISTRIBUTION, "birds")}
    row = {"run": "r", "asked": "test", "score": "distance", **sets}
    about, test, birds = {"run": "r", "asked": "test"}, Path("a/test.beton"), Path("birds.beton")
    assert confidence.there([row], about, test, [birds]) == {"distance"}
    assert confidence.there([row | {"images": "test"}], about, test, [birds]) == {"distance"}
    assert not confidence.there([row | {"images": "other"}], about, test, [birds])
    assert not confidence.there([row], about, test, [])


def test_the_jaccard_similarity_is_that_of_pythons_sets():
    random = np.random.default_rng(0)
    sets = [np.stack([random.permutation(20)[:7] for _ in range(30)]) for _ in range(4)]
    wanted = [
        np.mean([len(a & b) / len(a | b) for a, b in combinations([set(s[i].tolist()) for s in sets], 2)])
        for i in range(30)
    ]
    assert np.allclose(confidence.mean_jaccard([torch.from_numpy(s) for s in sets]), wanted)


def test_augmented_views_are_those_of_the_training(digits):
    """Of crops that are the images themselves, the loader's two views of its first epoch."""
    view, source = preset("digits").view, open_reader(digits["test"])
    side = int(source.sizes(np.array([0]))[0][0])
    view = type(view)(**{**vars(view), "resolution": side})
    with TwoViewLoader(source, view, LoaderSettings(50, 0)) as loader:
        batch = next(iter(loader))
        crops = evaluation_crops(source, view, np.arange(len(source)))
        found = list(confidence.augmented(crops, view, 2))
        for v in range(2):
            assert torch.equal(found[v][batch.indices], batch.views[v])
