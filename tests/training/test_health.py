"""Figures of the latent's health against counts by hand; runs that are ill: a line on stderr, status 1."""

import dataclasses
import json
import math

import pytest
import torch

from lvssl.commands.main import main
from lvssl.latents import FAMILIES
from lvssl.latents.noise import keyed
from lvssl.models.network import LVNet
from lvssl.runs.progress import read_metrics
from lvssl.runs.run import create_run
from lvssl.settings.pretrain import PRESETS, LatentSettings, ModelSettings
from lvssl.training.health import FIGURES, alarms, health
from lvssl.training.pretrain import pretrain


def figures(family: str, change=None) -> dict[str, float]:
    torch.manual_seed(0)
    network = LVNet(ModelSettings("tiny", 16, 8), LatentSettings(family=family), 8)
    outputs = network(torch.randn(200, 3, 8, 8), keyed(0, 200))
    if change is not None:
        outputs = dataclasses.replace(outputs, parameters=change(outputs.parameters.detach()))
    return {name: value.item() for name, value in health(network, outputs).items()}


def test_figures_are_counts():
    def three_dead(logits):  # two never on, one nearly always; one at its prior; four beyond +-7
        logits = logits.clamp(-6, 6)
        logits[:, :2], logits[:, 2], logits[:, 3] = -3, 3, 1e-3
        logits[:, 2][:1] = -3
        logits[:, 4:8] = 8 * logits[:, 4:8].sign()
        logits[::2, 8], logits[1::2, 8] = 0.3, -0.3  # 0.011 nats, which is just active
        return logits

    found = figures("bernoulli", three_dead)
    assert found["units"] == 64 and found["active_units"] == 63 and found["dead_bits"] == 4
    assert found["saturated"] == pytest.approx(4 / 64)
    assert found["logit_scale"] > 3


def test_bits_per_unit_of_a_bernoulli_is_its_sharpness():
    found = figures("bernoulli", lambda logits: torch.full_like(logits, 2.0))
    q = 1 / (1 + math.exp(-2.0))
    entropy = -q * math.log2(q) - (1 - q) * math.log2(1 - q)
    assert found["bits_per_unit"] == pytest.approx(1 - entropy, rel=1e-5) and found["logit_scale"] == 0


@pytest.mark.parametrize(("family", "locations"), [("gaussian", 64), ("mixture", 4 * 65), ("vmf", 64)])
def test_scales_and_their_variation_are_deviations_over_the_batch(family, locations):
    given = []

    def known(parameters):
        given.append(torch.randn_like(parameters) * torch.linspace(0.1, 2, parameters.shape[1]) + 3)
        return given[0]

    found = figures(family, known)
    deviations = given[0].double().std(dim=0, correction=0)
    assert found["logit_scale"] == pytest.approx(deviations[:locations].mean().item(), rel=1e-5)
    assert found["scale_variation"] == pytest.approx(deviations[locations:].mean().item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_them(family):
    found = figures(family)
    if not FAMILIES[family].stochastic:
        assert found == {}
        return
    assert set(found) >= set(FIGURES) - {"scale_variation"} and all(map(math.isfinite, found.values()))
    assert alarms(found | {"rate_bits": 1.0}, 0.0) == {}


def test_alarms_are_named():
    healthy = {"units": 100, "active_units": 60, "saturated": 0.1, "scale_variation": 0.2, "rate_bits": 9.0}
    assert alarms(healthy, 1.0) == {}
    assert list(alarms(healthy | {"active_units": 4}, 0.5)) == ["posterior collapse"]
    assert list(alarms(healthy | {"saturated": 0.95}, 0.5)) == ["saturation"]
    assert list(alarms(healthy | {"scale_variation": 1e-4}, 0.5)) == ["constant scale"]
    assert alarms(healthy | {"scale_variation": 0.0}, 0.1) == {}, "it starts constant"


@pytest.mark.parametrize("latent, ill", [
    ({"family": "bernoulli", "init_scale": 0.1}, "posterior collapse"),
    ({"family": "bernoulli", "init_scale": 300.0}, "saturation"),
    ({"family": "bernoulli"}, ""),
])  # fmt: skip
def test_a_run_says_how_its_latent_is(digits, tmp_path, capsys, latent, ill):
    base = PRESETS["digits"]
    settings = dataclasses.replace(
        base, data=digits["train"], out=tmp_path / "run", epochs=1, threads=1, log_every=5,
        latent=dataclasses.replace(base.latent, **latent),
    )  # fmt: skip
    pretrain(settings)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: step")]
    assert len([line for line in lines if ill and ill in line]) == bool(ill)
    assert all("active_units" in row for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert main(["doctor", str(tmp_path / "run")]) == bool(ill)
    said = capsys.readouterr().out
    assert "active_units" in said and ("ALARM " + ill if ill else "no alarms") in said


@pytest.mark.parametrize(("family", "said"), [
    ("none", "no latent to check (family none)"), ("sign", "no latent to check (family sign)"),
    ("gaussian", "no figures are logged yet (family gaussian)"),
])  # fmt: skip
def test_a_run_without_figures_says_whether_it_will_have_any(tmp_path, capsys, family, said):
    latent = dataclasses.replace(PRESETS["digits"].latent, family=family)
    create_run(dataclasses.replace(PRESETS["digits"], out=tmp_path / "run", latent=latent), 0, resume=False)
    assert main(["doctor", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}: {said}\n"


def test_a_run_whose_spread_is_constant(digits, tmp_path, capsys):
    """Found in the record of a run, however it came about."""
    base = PRESETS["digits"]
    latent = dataclasses.replace(base.latent, family="gaussian")
    pretrain(dataclasses.replace(
        base, data=digits["train"], out=tmp_path / "run", epochs=1, threads=1, latent=latent
    ))  # fmt: skip
    path = tmp_path / "run" / "metrics.jsonl"
    row = read_metrics(path)[-1]
    assert row["scale_variation"] > 1e-3
    path.write_text(json.dumps(row | {"scale_variation": 1e-5}) + "\n")
    assert main(["doctor", str(tmp_path / "run")]) == 1
    assert "ALARM constant scale" in capsys.readouterr().out
