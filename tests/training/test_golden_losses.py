"""The losses of tiny runs stay what they were, to the ninth digit, on any processor.

The pixels are the same bits everywhere (tests/pipelines/test_same_bits.py), and the network runs in fp64.
Its roundings, which differ between processors, are too small to flip a sampled bit.

After a wanted change: LVSSL_RENEW_GOLDEN=1 python -m pytest tests/training/test_golden_losses.py
"""

import dataclasses
import json
import os
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from lvssl.latents import bernoulli, gaussian
from lvssl.latents.noise import DOMAIN, MASK
from lvssl.settings.pretrain import PRESETS, PretrainSettings
from lvssl.training.trainer import Trainer
from pipelines.decode import open_reader
from pipelines.loader import TwoViewLoader

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 6
# Two processors, or forms of convolution, differ by some 1e-15 after these steps.
TOLERANCE = 1e-9


@pytest.fixture
def double():
    """Weights are created in fp64: normal numbers drawn in fp32 differ between processors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def losses_of(data: Path, family: str) -> list[float]:
    """The first six losses."""
    base = PRESETS["digits"]
    # The weights are named, so that the defaults may change.
    latent = dataclasses.replace(base.latent, family=family, decorrelation=0.02, clean_path_weight=0.5)
    chosen = dataclasses.replace(base, data=data, epochs=1, batch_size=64, latent=latent)
    with TwoViewLoader(open_reader(data), chosen.view, chosen.batch_size, chosen.seed, 1) as loader:
        trainer = Trainer(chosen, 10, loader, torch.device("cpu"))
        trainer.network.double().train()
        return [step_loss(trainer, chosen, batch) for batch in islice(loader, STEPS)]


def step_loss(trainer: Trainer, chosen: PretrainSettings, batch) -> float:
    figures = trainer.train_step(dataclasses.replace(batch, views=batch.views.double()))
    trainer.step += 1
    assert figures["loss"].dtype == torch.float64
    return float(figures["loss"])


@pytest.mark.parametrize("family", ["none", "sign", "gaussian", "bernoulli"])
def test_the_loss_of_each_family_stays_what_it_was(digits, double, family):
    found = losses_of(digits["train"], family)
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("LVSSL_RENEW_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {family: found}, indent=1) + "\n")
        return
    assert found == pytest.approx(golden[family], rel=TOLERANCE)


@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_the_losses_of_results_version_1_were_those_of_its_noise(digits, double, family, monkeypatch):
    """With what version 1 drew, from torch's generators, the losses are those that it had."""

    def drawn(draw, shape, like, noise):
        step, seed = noise.key.item() & MASK, (noise.key.item() >> 32) - DOMAIN
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return draw(shape, generator=generator, dtype=like.dtype)

    monkeypatch.setattr(bernoulli, "uniform", partial(drawn, torch.rand))
    monkeypatch.setattr(gaussian, "normal", partial(drawn, torch.randn))
    golden = json.loads(GOLDEN.with_name("golden_losses_version_1.json").read_text())
    assert losses_of(digits["train"], family) == pytest.approx(golden[family], rel=TOLERANCE)


def test_a_change_of_the_loss_by_a_hundred_thousandth_is_seen(digits, double, monkeypatch):
    """The test of the test above."""
    from lvssl.training import trainer

    def planted(outputs, settings, fraction, original=trainer.objective):
        figures = original(outputs, settings, fraction)
        return figures | {"loss": figures["loss"] * (1 + 1e-5)}

    monkeypatch.setattr(trainer, "objective", planted)
    found = losses_of(digits["train"], "bernoulli")
    golden = json.loads(GOLDEN.read_text())["bernoulli"]
    assert found != pytest.approx(golden, rel=TOLERANCE)
    assert found == pytest.approx(golden, rel=1e-3)  # the same run otherwise
