"""Gradients: a cached batch against one in a piece, recomputed blocks, clipping; what is not finite."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from lvssl.latents.noise import keyed
from lvssl.losses.ntxent import ntxent
from lvssl.models.device import autocast, precision
from lvssl.models.network import LVNet
from lvssl.settings.pretrain import EngineSettings, LatentSettings, ModelSettings, PretrainSettings
from lvssl.training.batchnorm import frozen_running_statistics
from lvssl.training.gradients import backward, clip_gradients
from lvssl.training.prepare import compiles, prepared, recompute_blocks
from pipelines.errors import InputError
from pipelines.views import ViewSettings

CPU = torch.device("cpu")
VIEWS = 48


def images(count: int = VIEWS) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def network(**engine) -> LVNet:
    torch.manual_seed(0)
    made = LVNet(ModelSettings("tiny", 32, 16), LatentSettings("bernoulli"), 8)
    settings = EngineSettings(**engine)
    made = prepared(made, settings, CPU)
    if settings.recompute:
        recompute_blocks(made.backbone)
    return made.train()


@pytest.mark.parametrize(("change", "compiled"), [
    ({}, True), ({"device": "cpu"}, False), ({"ranks": 2}, False), ({"images": 500_000}, False),
    ({"side": 64}, False), ({"side": 128}, False),
    ({"side": 128, "images": 2_000_000}, True), ({"chunk": 256}, False), ({"recompute": True}, False),
    ({"graph": "on"}, False),
    ({"deterministic": True}, False), ({"precision": "fp16"}, False), ({"compile": "off"}, False),
    ({"compile": "on", "device": "cpu", "ranks": 2, "images": 1, "side": 8}, True),
])  # fmt: skip
def test_a_backbone_is_compiled_where_it_is_worth_it(change, compiled):
    rest = dict(change)
    device, ranks, images = rest.pop("device", "cuda"), rest.pop("ranks", 1), rest.pop("images", 640_000)
    view = ViewSettings(resolution=rest.pop("side", 224))
    settings = PretrainSettings(view=view, engine=EngineSettings(**rest))
    assert bool(compiles(settings, images, torch.device(device), ranks)) is compiled


def gradients(net: LVNet, chunk: int = 0, x: Tensor | None = None) -> dict[str, Tensor]:
    """Of NT-Xent on both paths, with the latent's noise the same at every call."""

    def loss_of(features: Tensor) -> Tensor:
        outputs = net.heads(features, keyed(5, len(features)))
        return ntxent(outputs.projections) + ntxent(outputs.clean_projections)

    net.zero_grad()
    backward(net.backbone, images() if x is None else x, loss_of, nullcontext, chunk)
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        wrong = ((found[name] - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()
        assert wrong <= tolerance, f"{name}: off by {wrong:.1e} of its norm"


@pytest.mark.parametrize(("chunk", "why"), [(16, "even"), (20, "odd parts"), (47, "two"), (2, "pairs")])
def test_a_cached_batch_has_the_gradients_of_the_whole(chunk, why):
    """With frozen statistics in the backbone; heads and projector normalise over the whole batch in any case.
    Relative to each tensor's norm, in fp32."""
    net = network()
    net.backbone.eval()
    expected = gradients(net)
    assert_close(gradients(net, chunk), expected, 1e-5)
    assert_close(gradients(net, VIEWS), expected, 0)  # one piece is one piece


def test_chunks_of_a_normalising_backbone_see_their_own_statistics():
    """The documented difference: to the network, whole batch and chunks are other batches."""
    expected = gradients(network())
    wrong = gradients(network(), 16)
    assert max(((wrong[k] - v).norm() / v.norm()).item() for k, v in expected.items()) > 1e-2


def test_the_cache_moves_running_statistics_once():
    cached, by_hand = network(), network()
    gradients(cached, 16)
    with torch.no_grad():
        for part in images().split(16):
            by_hand.backbone(part)
    for (name, found), wanted in zip(cached.backbone.named_buffers(), by_hand.backbone.buffers()):
        assert torch.equal(found, wanted), name
    assert cached.backbone[1].num_batches_tracked == 3


def test_recomputed_blocks_give_the_same_gradients_and_statistics():
    plain, recomputed = network(), network(recompute=True)
    expected, found = gradients(plain), gradients(recomputed)
    assert_close(found, expected, 0)
    for (name, wanted), other in zip(plain.named_buffers(), recomputed.buffers()):
        assert torch.equal(wanted, other), name
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    assert_close(gradients(recomputed, 16), gradients(plain, 16), 0)  # both together


def test_recomputation_keeps_less(record_property):
    """Bytes that autograd keeps between forward and backward."""

    def kept(net: LVNet) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net.backbone(images())
        return sum(sizes.values())

    assert kept(network(recompute=True)) < 0.5 * kept(network())


def test_frozen_statistics_still_normalise_by_the_batch():
    norm = nn.BatchNorm2d(3)
    x = images() * 7 + 2
    with frozen_running_statistics(norm):
        output = norm(x)
    assert output.mean().abs() < 1e-5 and (output.std() - 1).abs() < 1e-2
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any() and norm.momentum == 0.1


def test_clipping_is_torchs():
    net, same = network(), network()
    gradients(net), gradients(same)
    norm = clip_gradients(net.parameters(), clip=0.01)
    wanted = nn.utils.clip_grad_norm_(same.parameters(), 0.01)
    torch.testing.assert_close(norm, wanted)
    for found, expected in zip(net.parameters(), same.parameters()):
        torch.testing.assert_close(found.grad, expected.grad)
    before = [p.grad.clone() for p in net.parameters()]
    clip_gradients(net.parameters(), clip=1e9)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, net.parameters()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_gradient_that_is_not_finite_is_seen(value):
    net = network()
    gradients(net)
    next(net.parameters()).grad[0, 0, 0, 0] = value
    assert not clip_gradients(net.parameters(), clip=1.0).isfinite()


def test_a_compiled_backbone_is_not_recomputed():
    """torch can't compile a checkpoint that leaves the statistics alone at its second time."""
    with pytest.raises(InputError, match="--compile on and --recompute can't be combined"):
        EngineSettings(compile="on", recompute=True).validate()


def test_precision_follows_the_device():
    cuda = torch.device("cuda")
    assert precision(EngineSettings(), cuda) == torch.bfloat16
    assert precision(EngineSettings(), CPU) == torch.float32
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        with autocast(EngineSettings(precision=name), CPU):
            features = network().backbone(images())
        assert features.dtype == dtype
    with autocast(EngineSettings(precision="bf16"), CPU):
        outputs = network().heads(features.bfloat16(), keyed(0, len(features)))
    assert outputs.parameters.dtype == torch.float32


def test_layout_follows_the_setting():
    weight = "3.conv1.weight"
    for wanted in (True, False):
        net = network(channels_last=wanted)
        assert net.backbone.state_dict()[weight].is_contiguous(memory_format=torch.channels_last) is wanted
