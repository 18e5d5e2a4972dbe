"""Compare the fused kernels, in Triton's interpreter, with their reference. Run by test_fused.py.

TRITON_INTERPRET=1 python tests/latents/fused_interpreted.py
"""

import json
import sys

import torch
from triton.runtime.interpreter import InterpretedFunction

from lvssl.latents import family, fused, fused_triton
from lvssl.latents.noise import keyed, rows_of
from lvssl.models.network import LVNet
from lvssl.settings.pretrain import LatentSettings, ModelSettings, PretrainSettings
from lvssl.training.objective import objective

# Rows; dimensions: one, below a byte, around a byte, several, around a block of 1,024, two blocks.
SIZES = ((1, 1), (3, 7), (2, 8), (5, 37), (2, 1023), (1, 1024), (2, 1500), (0, 8))


def compare(name: str, rows: int, dim: int, count: int, scale: float) -> None:
    kind = family(name, categories=4)
    generator = torch.Generator().manual_seed(dim + count)
    x = scale * torch.randn(rows, kind.parameter_count(dim), generator=generator)
    key = torch.tensor([(-1) ** count * (2**62 + 12345 + dim)])
    places = torch.arange(rows) * 1_000_003 + 2**31 - 1  # below 2^32
    weights = torch.randn(rows, dim, generator=generator)
    found = []
    for form in (fused.draw, fused.reference):
        leaf = x.clone().requires_grad_()
        drawn = form(kind, leaf, count, key, places)
        loss = (
            (drawn.sample * weights).sum()
            + 0.3 * drawn.kl.sum()
            - 0.7 * (drawn.entropy * drawn.entropy).sum()
        )
        loss.backward()
        found.append((*drawn[:3], leaf.grad))
        assert drawn.packed.shape[1] == (-(-dim // 8) if name == "bernoulli" else 0)
        found[-1] += (drawn.packed,)
    for label, ours, expected in zip(("sample", "kl", "entropy", "gradient", "bits"), *found):
        torch.testing.assert_close(
            ours, expected, rtol=2e-5, atol=2e-5 * max(1.0, dim / 100),
            msg=lambda said, label=label: f"{name} [{rows}, {dim}] K {count} x {scale}: {label}: {said}",
        )  # fmt: skip


def whole_step(name: str) -> None:
    """Compare the network and its objective through the kernel with the same through the reference."""
    settings = PretrainSettings(
        model=ModelSettings("tiny", 16, 8), latent=LatentSettings(family=name, beta=0.1, samples=3)
    )
    fused.usable, kernel, found = (lambda family, parameters: True), fused.draw, []
    for form in (kernel, fused.reference):
        fused.draw = form
        torch.manual_seed(0)
        network = LVNet(settings.model, settings.latent, 8)
        features = network.backbone(torch.randn(8, 3, 8, 8))
        outputs = network.heads(features, keyed(1, rows_of(8, 2, 1, 2, features.device)), 0.5)
        assert outputs.kl is not None
        loss = objective(outputs, settings, 0.5)["loss"]
        loss.backward()
        found.append((loss.detach(), network.backbone[0].weight.grad))
    fused.draw = kernel
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def main() -> None:
    assert isinstance(fused_triton.bernoulli_kernel, InterpretedFunction)
    checked = 0
    for name in ("bernoulli", "gaussian", "categorical"):
        for rows, dim in SIZES:
            width = 4 * dim if name == "categorical" else dim
            for count in (1, 4, 6) if dim < 100 else (2,):
                compare(name, rows, width, count, 2.0)
                checked += 1
        for scale in (1e-4, 60.0, 1e4):  # near the prior; saturated; beyond every bound
            compare(name, 3, 16, 4, scale)
            checked += 1
        whole_step(name)
    print(json.dumps({"compared": checked}))


if __name__ == "__main__":
    sys.exit(main())
