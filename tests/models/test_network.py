"""Backbones, the head's normalisation, and what teaches what."""

import pytest
import torch
import torch.nn as nn
import torchvision

from lvssl.config import BACKBONES as NAMES
from lvssl.config import LatentSettings, ModelSettings
from lvssl.latents import FAMILIES
from lvssl.models.backbone import BACKBONES, build_backbone, feature_dim
from lvssl.models.network import Head, LVNet

MODEL = ModelSettings(backbone="tiny", hidden=32, projection=16)


def network(family: str, classes: int = 3, **latent) -> LVNet:
    torch.manual_seed(0)
    return LVNet(MODEL, LatentSettings(family=family, **latent), 16, classes)


def test_settings_and_code_know_the_same_names():
    assert set(NAMES) == set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("resolution", [8, 32, 96])
def test_backbones_give_their_features(name, resolution):
    backbone, dim = build_backbone(name, resolution)
    backbone.eval()
    assert backbone(torch.randn(2, 3, resolution, resolution)).shape == (2, dim) and dim == feature_dim(name)


def test_the_stem_follows_the_resolution():
    small, large = (build_backbone("resnet18", r)[0] for r in (32, 224))
    assert small.conv1.stride == (1, 1) and isinstance(small.maxpool, nn.Identity)
    assert large.conv1.stride == (2, 2) and isinstance(large.maxpool, nn.MaxPool2d)


def test_a_resnet_50_loads_into_torchvisions():
    backbone, _ = build_backbone("resnet50", 224)
    missing, unexpected = torchvision.models.resnet50(weights=None).load_state_dict(
        backbone.state_dict(), strict=False
    )
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dim", [0, 24])
def test_a_step_reaches_every_parameter(family, dim):
    if dim and family in ("none", "sign"):
        return
    net = network(family, dim=dim)
    outputs = net(torch.randn(8, 3, 16, 16))
    loss = outputs.projections.square().sum() + outputs.posterior.kl().mean()
    if outputs.clean_projections is not None:
        loss = loss + outputs.clean_projections.square().sum()
    for logits in net.probe_logits(outputs).values():
        loss = loss + logits.square().sum()
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_probes_teach_the_encoder_nothing():
    net = network("bernoulli")
    outputs = net(torch.randn(8, 3, 16, 16))
    sum(logits.square().sum() for logits in net.probe_logits(outputs).values()).backward()
    assert all(p.grad is None for n, p in net.named_parameters() if not n.startswith("probes"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_images_code_does_not_depend_on_its_batch(family):
    net = network(family)
    net(torch.randn(32, 3, 16, 16))  # some running statistics
    net.eval()
    images = torch.randn(9, 3, 16, 16)
    with torch.no_grad():
        together = net.encode(images)[1].code()
        alone = torch.cat([net.encode(images[i : i + 1])[1].code() for i in range(9)])
    assert torch.equal(together, alone)


def test_logits_start_at_the_set_sharpness():
    net = network("bernoulli", sharpness=4.0)
    logits = net(torch.randn(64, 3, 16, 16)).posterior.logits
    assert logits.std(0).mean().item() == pytest.approx(4.0, rel=0.05)
    assert logits.mean(0).abs().max() < 1e-3


def test_calibration_puts_the_thresholds_at_the_exact_mean():
    head = Head(FAMILIES["bernoulli"], 5, 5, 4.0)
    features = torch.randn(1000, 5) * 3 + 7
    head.calibrate(features)
    head.eval()
    logits = head(features)
    assert logits.mean(0).abs().max() < 1e-4 and (logits.std(0) - 4).abs().max() < 1e-3


def test_k_samples_narrow_the_projectors_input():
    one, many = (network("bernoulli", samples=k, sharpness=1.0) for k in (1, 64))
    images = torch.randn(16, 3, 16, 16)
    spread = []
    for net in (one, many):
        posterior = net(images).posterior
        draws = [posterior.sample(net.samples, torch.Generator().manual_seed(s)).mean(0) for s in range(20)]
        spread.append(torch.stack(draws).std(0).mean().item())
    assert spread[1] == pytest.approx(spread[0] / 8, rel=0.2)


def test_family_none_is_plain_simclr():
    net = network("none")
    images = torch.randn(8, 3, 16, 16)
    outputs = net(images)
    assert outputs.clean_projections is None
    assert torch.equal(outputs.posterior.sample()[0], outputs.features)
