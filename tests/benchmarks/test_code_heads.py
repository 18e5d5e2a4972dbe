"""Codes on frozen features: the rows on digits, kept once made, and the objectives against plain forms."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks.code_heads import TERMS, barlow, expected_similarity, main, objective, rows
from lvssl.latents.bernoulli import Bernoulli
from lvssl.latents.noise import keyed
from lvssl.settings.pretrain import preset
from lvssl.training.pretrain import pretrain
from pipelines.errors import InputError


@pytest.mark.slow
def test_rows_are_made_once_and_decorrelation_decorrelates(digits, tmp_path):
    settings = dataclasses.replace(
        preset("digits"), data=digits["train"], out=tmp_path / "run", epochs=1, threads=1
    )
    pretrain(dataclasses.replace(settings, latent=dataclasses.replace(settings.latent, family="none")))
    command = ["--run", str(settings.out), "--train", str(digits["train"]), "--test", str(digits["test"])]
    command += [
        "--bits",
        "16",
        "--seeds",
        "0",
        "1",
        "--epochs",
        "1",
        "--batch",
        "128",
        "--steps",
        "30",
        "--rate",
        "0.01",
    ]
    command += ["--out", str(tmp_path / "heads"), "--json", str(tmp_path / "heads.json"), "--only"]
    main([*command, "sign"])
    controls = json.loads((tmp_path / "heads.json").read_text())["rows"]
    assert [m["name"] for m in controls] == ["sign", "PCA-sign"]
    main([*command, "decorrelation"])
    result = json.loads((tmp_path / "heads.json").read_text())
    assert len(result["rows"]) == 8
    found = {(m["start"], m["of"], m["seed"]): m for m in result["rows"]}
    assert found["identity", "hard", 0]["correlation"] < 0.8 * controls[0]["correlation"]
    each = result["samples_minus_hard"]["decorrelation_knn"]["each"]
    pairs = [[found["orthogonal", of, seed]["knn"] for of in ("sample", "hard")] for seed in (0, 1)]
    assert each == pytest.approx([sample - hard for sample, hard in pairs])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "heads").glob("decorrelation*")}
    main([*command, "decorrelation"])
    assert len(kept) == 8 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    with pytest.raises(InputError, match="other settings"):
        main([*command, "sign", "--steps", "50"])


def test_every_term_trains_the_logits():
    views = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    for row in rows([0]):
        if row.start:
            logits = views.clone().requires_grad_()
            noise, project = keyed(1, 24), torch.nn.Linear(16, 4)
            loss = objective(row, Bernoulli().posterior(logits), noise, project)
            (grad,) = torch.autograd.grad(loss, logits)
            assert loss > 0 and bool((grad.abs().sum(dim=1) > 0).all()), row
    assert {row.term for row in rows([0])} == {"", *TERMS}


def test_expected_similarity_is_that_of_samples():
    logits = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    posterior = Bernoulli().posterior(logits)
    first, second = (posterior.sample(40_000, keyed(s, 8)).double() for s in (1, 2))
    similarity = torch.einsum("knd,kmd->nm", first, second) / 40_000 / 12
    similarity = similarity.fill_diagonal_(-torch.inf) / 0.2
    losses = [-similarity[i].log_softmax(0)[(i + 4) % 8] for i in range(8)]
    assert float(expected_similarity(posterior)) == pytest.approx(float(sum(losses)) / 8, abs=0.01)


def test_barlow_is_the_correlation_of_the_views():
    bits = np.sign(np.random.default_rng(0).standard_normal((60, 5)))
    correlation = np.corrcoef(bits[:30].T, bits[30:].T)[:5, 5:]
    expected = sum(
        (1 - correlation[i, i]) ** 2 if i == j else 0.005 * correlation[i, j] ** 2
        for i in range(5)
        for j in range(5)
    )
    assert float(barlow(torch.from_numpy(bits))) == pytest.approx(expected / 5, rel=1e-3)
