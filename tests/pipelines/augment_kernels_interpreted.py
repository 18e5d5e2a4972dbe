"""Compare the augmentation's kernels, in Triton's interpreter, with the fp64 reference; JSON, one per case.

    TRITON_INTERPRET=1 python tests/pipelines/augment_kernels_interpreted.py [case ...]

A case is SIDE:COUNT:DTYPE. Run by test_augment_gpu.py. With `cuda` as the first argument, the same cases run
on a GPU instead.
"""

import json
import sys

import numpy as np
import torch

from pipelines.augment import gpu, reference
from pipelines.parameters import BRIGHTNESS, SIGMA, SOLARISE, P, draw_parameters
from pipelines.views import ViewSettings

# 8: smallest, one tap. 9: odd, less than a tile. 20: three taps. 33: odd, a tile of fp32 and a pixel.
CASES = ("8:1:float32", "9:2:float16", "20:1:bfloat16", "33:1:float32")


def compared(side: int, count: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return mean and maximum error in levels of 1/255, excluding values at solarise's step."""
    view = ViewSettings(
        resolution=side, jitter=0.9, blur=0.7, solarise=0.3, mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 1.0)
    )
    crops = pictures(count, side)
    sizes = np.full(count, side)
    table = torch.from_numpy(draw_parameters(view, 3, 1, np.arange(count), sizes, sizes)[:, 1].copy())
    table[0, SIGMA] = 1.3
    if side == 8:  # everything optional is left out
        table = torch.zeros(1, P)
        table[:, BRIGHTNESS : BRIGHTNESS + 3] = 1
    exact = reference.augment(crops, table, view, torch.float64)
    got = gpu.augment(crops.to(device), table.to(device), view, dtype).cpu()
    assert got.dtype == dtype and got.shape == exact.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    error = (got.double() - exact).abs() * torch.tensor(view.std, dtype=torch.float64).view(3, 1, 1) * 255
    # A value within rounding of 0.5 may fall on either side of solarise's step, which is one level high.
    stepped = error > 0.9 if dtype == torch.float32 else torch.zeros_like(error, dtype=torch.bool)
    stepped &= (table[:, SOLARISE] != 0).view(-1, 1, 1, 1)
    return {
        "mean": error[~stepped].mean().item(),
        "max": error[~stepped].max().item(),
        "stepped": stepped.double().mean().item(),
    }


def pictures(count: int, side: int) -> torch.Tensor:
    """Return smooth colours with black, white and grey pixels: uint8 [N, R, R, 3]."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    crops = (smooth * 300 - 20).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    crops[:, 0, 0], crops[:, 0, 1], crops[:, 1, 0] = 0, 255, 128
    return crops


def main(arguments: list[str]) -> None:
    device = "cuda" if arguments[:1] == ["cuda"] else "cpu"
    for case in arguments[device == "cuda" :] or CASES:
        side, count, dtype = case.split(":")
        error = compared(int(side), int(count), getattr(torch, dtype), device)
        print(json.dumps({"case": case, "dtype": dtype, **error}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
