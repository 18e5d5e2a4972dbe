"""The comparison of codes: the best control is found over seeds, parts fill up what is missing."""

import json

import numpy as np
import pytest

from benchmarks.latents import accuracies, compared, controls, difference, finished, main
from lvssl.evaluation.embedding import Embedding
from lvssl.evaluation.knn import hamming_knn
from pipelines.errors import InputError
from pipelines.kernels.pack import pack_bits


def row(arm, seed, features, codes, bits=None):
    codes = {
        length: {name: {"probe": v, "knn": v - 1} for name, v in made.items()}
        for length, made in codes.items()
    }
    features = {"probe": features, "knn": features - 5}
    return {"arm": arm, "seed": seed, "bits": bits, "width": 256, "features": features, "codes": codes}


def test_the_best_control_is_the_best_over_the_shared_seeds():
    rows = [
        row("none", 0, 60, {"256": {"sign": 50, "itq": 58}}),  # itq is best on seed 0, sign of `sign` overall
        row("none", 1, 62, {"256": {"sign": 52, "itq": 50}}),
        row("sign", 0, 61, {"256": {"sign": 55, "lsh": 40}}),
        row("sign", 1, 60, {"256": {"sign": 57, "lsh": 41}}),
        row("bernoulli", 0, 61, {"256": {"code": 57}}, bits=256),
        row("bernoulli", 1, 63, {"256": {"code": 58}}, bits=256),
        row("bernoulli", 0, 99, {"64": {"code": 45}}, bits=64),  # no control has 64 bits: no difference
    ]
    found = compared(rows)["differences"]
    assert set(found) == {"features_probe", "code256_probe", "code256_knn"}
    assert found["code256_probe"] == {
        "mean": 1.5, "standard_error": 0.5, "seeds": [0, 1], "each": [2, 1], "control": "sign, sign",
    }  # fmt: skip
    assert found["features_probe"]["control"] == "none, features"  # 61 on average, as `sign` has 60.5
    assert found["features_probe"]["each"] == [1, 1]  # the 64-bit run's features are not compared


def test_a_control_with_fewer_seeds_is_not_preferred():
    found = difference({0: 50.0, 1: 52.0}, {"few": {0: 60.0}, "both": {0: 49.0, 1: 51.0, 2: 90.0}})
    assert found == {"mean": 1, "standard_error": 0, "seeds": [0, 1], "each": [1, 1], "control": "both"}
    assert difference({0: 1.0}, {"other": {1: 2.0}}) is None
    assert difference({0: 1.0}, {"one": {0: 2.0}})["standard_error"] is None


def test_finished_rows_are_those_with_figures(tmp_path):
    for name in ("digits-none-s0", "digits-bernoulli64-s0", "fashion-mnist-none-s0"):
        (tmp_path / name).mkdir()
    (tmp_path / "digits-none-s0" / "figures.json").write_text(json.dumps({"arm": "none"}))
    (tmp_path / "fashion-mnist-none-s0" / "figures.json").write_text(json.dumps({"arm": "none"}))
    assert finished(tmp_path, "digits") == [{"arm": "none"}]


def test_bits_are_compared_by_hamming_distance():
    generator = np.random.default_rng(0)
    sets = [
        Embedding(h, np.zeros((n, 1), np.uint8), 8, np.zeros(n), 0.0, np.arange(n) % 3, np.arange(n), None)
        for n in (60, 30)
        for h in [generator.standard_normal((n, 12)).astype(np.float32)]
    ]
    made = controls(8, *sets)
    assert set(made) == {"sign", "pca_sign", "itq", "lsh"} and set(controls(16, *sets)) == {"lsh"}
    for pair in made.values():
        assert [x.shape for x in pair] == [(60, 8), (30, 8)]
        packed = [pack_bits(x) for x in pair]
        expected = hamming_knn(packed[0], sets[0].labels, packed[1], sets[1].labels, 8)
        assert accuracies(pair, sets[0].labels, sets[1].labels)["knn"] == expected


@pytest.mark.slow
def test_the_whole_comparison_on_digits(tmp_path):
    """Trains for two epochs, is repeated without training, and gains a part."""
    common = ["--data", "digits", "--seeds", "0", "--epochs", "2", "--out", str(tmp_path / "runs")]
    main([*common, "--bits", "64", "--json", str(tmp_path / "a.json")])
    kept = (tmp_path / "runs" / "digits-none-s0" / "figures.json").read_bytes()
    main([*common, "--bits", "64", "16", "--json", str(tmp_path / "b.json")])
    first, second = (json.loads((tmp_path / f"{x}.json").read_text())["data"]["digits"] for x in "ab")
    assert set(first["differences"]) == {"features_probe", "code64_knn", "code64_probe"}
    assert set(second["differences"]) == set(first["differences"]) | {"code16_knn", "code16_probe"}
    grown = json.loads((tmp_path / "runs" / "digits-none-s0" / "figures.json").read_text())
    assert grown["codes"]["64"] == json.loads(kept)["codes"]["64"]  # nothing finished is measured anew
    assert {"sign", "pca_sign", "itq", "lsh"} == set(grown["codes"]["64"])
    with pytest.raises(InputError, match="other --images or --epochs"):
        main([*common, "--bits", "64", "--epochs", "3"])
