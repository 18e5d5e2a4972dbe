"""Does the form of the augmentation matter to what is learnt? Paired runs, reference against numba."""

import dataclasses

import numpy as np
import pytest
import torch

from lvssl.evaluation.embedding import embed
from lvssl.evaluation.probe import linear_probe
from lvssl.runs.run import load_run
from lvssl.settings.pretrain import PRESETS
from lvssl.training.pretrain import pretrain
from pipelines.decode import open_reader

SEEDS = (0, 1, 2)


@pytest.mark.slow
def test_both_forms_learn_the_same(digits, tmp_path):
    """Probe accuracy within noise: two standard errors of the paired difference, plus half a point."""
    base = dataclasses.replace(PRESETS["digits"], data=digits["train"], epochs=10)
    found: dict[str, list[float]] = {"reference": [], "numba": []}
    for seed in SEEDS:
        for form, accuracies in found.items():
            out = tmp_path / f"{form}-{seed}"
            pretrain(dataclasses.replace(base, out=out, seed=seed, augmentation=form))
            network = load_run(out).network
            train, test = (
                embed(network, open_reader(digits[split]), base.view) for split in ("train", "test")
            )
            accuracy = linear_probe(train.features, train.labels, test.features, test.labels).accuracy
            accuracies.append(accuracy)
    difference = np.subtract(found["numba"], found["reference"])
    error = difference.std(ddof=1) / len(SEEDS) ** 0.5
    print(f"{found} difference {difference.mean():+.2f} +- {error:.2f}")
    assert abs(difference.mean()) <= 2 * error + 0.5


def test_the_run_names_its_form(digits, tmp_path, capfd):
    for form, named in (("auto", "numba"), ("reference", "reference")):
        settings = dataclasses.replace(
            PRESETS["digits"], data=digits["train"], out=tmp_path / form, epochs=1, augmentation=form
        )
        pretrain(settings)
        assert f"on cpu, augmented by {named}" in capfd.readouterr().err
    weights = [load_run(tmp_path / form).network.state_dict() for form in ("auto", "reference")]
    for name, value in weights[0].items():  # the same views up to rounding, and so the same steps
        assert torch.allclose(value.float(), weights[1][name].float(), atol=2e-2), name
