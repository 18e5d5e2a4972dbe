"""Backbones, the head's normalisation, and what teaches what."""

import pytest
import torch
import torch.nn as nn
import torchvision
from torchvision.models.resnet import BasicBlock

from lvssl.latents import FAMILIES
from lvssl.latents.gaussian import Gaussian
from lvssl.latents.noise import keyed
from lvssl.models.backbone import RESNETS, SMALL, build_backbone, feature_dim, stage_means, stage_widths
from lvssl.models.network import Head, LVNet
from lvssl.settings.pretrain import BACKBONES, LatentSettings, ModelSettings
from pipelines.errors import InputError

MODEL = ModelSettings(backbone="tiny", hidden=32, projection=16)


def network(family: str, classes: int = 3, **latent) -> LVNet:
    torch.manual_seed(0)
    return LVNet(MODEL, LatentSettings(family=family, **latent), 16, classes)


def test_settings_and_code_know_the_same_names():
    assert (*SMALL, *RESNETS) == BACKBONES


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("resolution", [8, 96])
def test_backbones_give_their_features(name, resolution):
    backbone, dim = build_backbone(name, resolution)
    backbone.eval()
    assert backbone(torch.randn(2, 3, resolution, resolution)).shape == (2, dim) and dim == feature_dim(name)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_means_of_the_stages_are_those_of_the_activations_one_after_another(name):
    backbone, x = build_backbone(name, 16)[0].eval(), torch.randn(2, 3, 16, 16)
    ends = [getattr(backbone, f"layer{i}", None) for i in range(1, 5)]
    if name in ("tiny", "small"):
        ends = [module for module in backbone if isinstance(module, BasicBlock)]
    with torch.no_grad(), stage_means(backbone) as means:
        backbone(x + 1)
        features, wanted, activations = backbone(x), [], x
        for module in backbone.children():
            activations = module(activations)
            if any(module is end for end in ends):
                wanted.append(activations.mean(dim=(2, 3)))
            if module is ends[-1]:
                break
    assert len(means) == len(wanted) and torch.equal(torch.cat(means, 1), torch.cat(wanted, 1))
    assert torch.allclose(means[-1], features, atol=1e-5)
    assert [mean.shape[1] for mean in means] == list(stage_widths(name))
    last = means[-1]
    backbone(x + 2)
    assert means[-1] is last  # nothing is kept any more


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
@pytest.mark.parametrize("dim", [0, 32])
def test_a_step_reaches_every_parameter(family, dim):
    if dim and family in ("none", "sign"):
        return
    net = network(family, dim=dim)
    outputs = net(torch.randn(8, 3, 16, 16), keyed(0, 8))
    loss = outputs.projections.square().sum() + outputs.posterior.kl().mean()
    if outputs.clean_projections is not None:
        loss = loss + outputs.clean_projections.square().sum()
    for logits in net.probe_logits(outputs).values():
        loss = loss + logits.square().sum()
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_probes_teach_the_encoder_nothing():
    net = network("bernoulli")
    outputs = net(torch.randn(8, 3, 16, 16), keyed(0, 8))
    sum(logits.square().sum() for logits in net.probe_logits(outputs).values()).backward()
    assert all(p.grad is None for n, p in net.named_parameters() if not n.startswith("probes"))


@pytest.mark.parametrize("family", [*FAMILIES, "gaussian+bernoulli"])
def test_an_images_code_does_not_depend_on_its_batch(family):
    for site in ("repr", "proj") if FAMILIES.get(family, Gaussian).stochastic else ("repr",):
        net = network(family, site=site)
        net(torch.randn(32, 3, 16, 16), keyed(0, 32))  # some running statistics
        net.eval()
        images = torch.randn(9, 3, 16, 16)
        with torch.no_grad():
            together = net.encode(images)[1].code()
            alone = torch.cat([net.encode(images[i : i + 1])[1].code() for i in range(9)])
        assert torch.equal(together, alone)


def test_logits_start_at_the_set_sharpness():
    net = network("bernoulli", init_scale=4.0)
    logits = net(torch.randn(64, 3, 16, 16), keyed(0, 64)).posterior.logits
    assert logits.std(0).mean().item() == pytest.approx(4.0, rel=0.05)
    assert logits.mean(0).abs().max() < 1e-3


def test_calibration_puts_the_thresholds_at_the_exact_mean():
    head = Head(LatentSettings(), 5, 5)
    features = torch.randn(1000, 5) * 3 + 7
    head.calibrate(features)
    head.eval()
    logits = head(features)
    assert logits.mean(0).abs().max() < 1e-4 and (logits.std(0) - 4).abs().max() < 1e-3


def test_k_samples_narrow_the_projectors_input():
    one, many = (network("bernoulli", samples=k, init_scale=1.0) for k in (1, 64))
    images = torch.randn(16, 3, 16, 16)
    spread = []
    for net in (one, many):
        posterior = net(images, keyed(0, len(images))).posterior
        draws = [posterior.sample(net.latent.samples, keyed(s, 16)).mean(0) for s in range(20)]
        spread.append(torch.stack(draws).std(0).mean().item())
    assert spread[1] == pytest.approx(spread[0] / 8, rel=0.2)


def test_family_none_is_plain_simclr():
    net = network("none")
    images = torch.randn(8, 3, 16, 16)
    outputs = net(images, keyed(0, len(images)))
    assert outputs.clean_projections is None
    assert torch.equal(outputs.posterior.sample(1, keyed(0, 8))[0], outputs.features)


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].stochastic])
def test_at_the_projectors_output_the_samples_are_what_is_compared(family):
    net = network(family, site="proj", sample_reduction="losses", samples=3)
    images, noise = torch.randn(8, 3, 16, 16), keyed(0, 8)
    outputs = net(images, noise)
    assert outputs.projections.shape == (3, 8, 16) and net.dim == 16
    expected = outputs.posterior.sample(3, keyed(0, 8))
    assert torch.equal(outputs.projections, expected)


def test_where_samples_meet():
    """Averaged before the projector, after it, or not at all: the same samples."""
    images = torch.randn(8, 3, 16, 16)
    found = {}
    for average in ("samples", "projections", "losses"):
        net = network("bernoulli", sample_reduction=average)
        outputs = net(images, keyed(0, 8))
        samples = outputs.posterior.sample(4, keyed(0, 8))
        each = net.projector(samples.flatten(0, 1)).unflatten(0, (4, 8))
        expected = {"samples": net.projector(samples.mean(0)), "projections": each.mean(0), "losses": each}
        assert torch.allclose(outputs.projections, expected[average], atol=1e-5)
        found[average] = outputs.projections
    assert found["losses"].shape == (4, 8, 16) and not torch.allclose(found["samples"], found["projections"])


def test_sharpness_and_relaxation_are_annealed_and_final_at_evaluation():
    net = network("bernoulli", init_scale=4.0, init_scale_start=1.0, anneal=0.5)
    images = torch.randn(64, 3, 16, 16)
    noise = keyed(0, 64)
    scales = [net(images, noise, f).posterior.logits.std(0).mean().item() for f in (0.0, 0.25, 0.5, 1.0)]
    assert scales == pytest.approx([1.0, 2.0, 4.0, 4.0], rel=0.05)
    assert net.encode(images)[1].logits.std(0).mean().item() == pytest.approx(4.0, rel=0.05)

    net = network("bernoulli", estimator="relaxed", relaxation=0.1, relaxation_start=10.0, init_scale=0.1,
                  samples=1, site="proj")  # fmt: skip
    hardness = [net(images, keyed(0, 64), f).projections.abs().mean() for f in (0.0, 0.25, 0.5)]
    assert hardness[0] < 0.15 < hardness[1] < 0.8 < hardness[2]


@pytest.mark.parametrize("site", ["repr", "proj"])
def test_images_are_read_in_the_precision_that_is_set(site):
    """As a run on a GPU is loaded: the network in bf16, the posterior in fp32, and nearly the same code."""
    net = network("bernoulli", site=site).eval()
    images = torch.randn(32, 3, 16, 16)
    features, exact = net.encode(images)
    assert features.dtype == torch.float32 and torch.equal(features, net.features(images))
    net.calibrate(features)
    exact = net.encode(images)[1]
    net.precision = torch.bfloat16
    features, posterior = net.encode(images)
    assert features.dtype == net.features(images).dtype == torch.bfloat16
    assert posterior.parameters.dtype == torch.float32
    assert (posterior.code() == exact.code()).float().mean() > 0.97
    assert not torch.equal(posterior.parameters, exact.parameters)
    assert net(images, keyed(0, len(images))).features.dtype == torch.float32, "the training has its own"
    net.calibrate(features)


def test_a_fixed_scale_stays():
    net = network("gaussian", posterior_scale="fixed", init_scale=2.0)
    posterior = net(torch.randn(8, 3, 16, 16), keyed(0, 8)).posterior
    assert posterior.log_variance.unique().item() == pytest.approx(-2 * 0.6931472)
    assert not any("head.scale" in name for name, _ in net.named_parameters())


def test_impossible_latents_are_refused():
    for wrong, culprit in (
        ({"family": "gauss"}, "known"),
        ({"family": "none+gaussian"}, "can be combined"),
        ({"site": "middle"}, "site"),
        ({"family": "categorical", "categories": 12}, "power of two"),
        ({"family": "categorical", "dim": 24}, "16"),
        ({"family": "none", "site": "proj"}, "repr"),
        ({"family": "gaussian", "estimator": "relaxed"}, "straight"),
        ({"family": "gaussian", "init_scale_start": 1.0}, "no logits"),
        ({"objective": "ceb"}, "on the sphere"),
        ({"objective": "hib", "sample_reduction": "samples"}, "losses"),
        ({"anneal": 0.0}, "anneal"),
        ({"depth": 9}, "depth"),
        ({"relaxation": 0.0}, "relaxation"),
        ({"beta_cycles": 0}, "beta-cycles"),
        ({"family": "vmf", "dim": 1}, "2"),
    ):
        with pytest.raises(InputError, match=culprit):
            LatentSettings(**wrong).validate()
