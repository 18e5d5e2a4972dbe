"""The same pixels on every processor: digests of what compiled code makes, fixed for good.

numba compiles for the processor it finds; `make test-cpus` runs these on several. After a wanted change:
LVSSL_RENEW_GOLDEN=1 python -m pytest tests/pipelines/test_same_bits.py
"""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from old_order import order_keys

from pipelines.augment import cpu
from pipelines.convert.area import shrink
from pipelines.decode.resize import resize_crop
from pipelines.kernels.elementary import exp, log
from pipelines.order import epoch_order
from pipelines.parameters import draw_parameters
from pipelines.views import ViewSettings

GOLDEN = Path(__file__).with_name("golden_pixels.json")
SIZES = [(40, 64), (256, 200), (600, 401), (33, 90)]  # of images, height and width


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise over a ramp, from whole numbers alone: uint8 [H, W, 3]."""
    noise = order_keys(seed, 0, height * width * 3) % np.uint64(96)
    ramp = np.arange(width, dtype=np.uint64)[None, :, None] * np.uint64(160) // np.uint64(width)
    return (noise.reshape(height, width, 3) + ramp).astype(np.uint8)


def parameters() -> np.ndarray:
    heights, widths = (np.array([size[k] for size in SIZES] * 500) for k in (0, 1))
    return draw_parameters(ViewSettings(solarise=0.2), 7, 3, np.arange(2000), heights, widths)


def crops(side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    table = parameters()[:count]
    found = np.empty((count, 2, side, side, 3), np.uint8)
    for n in range(count):
        pixels = image(*SIZES[n % len(SIZES)], seed=n)
        for view in range(2):
            resize_crop(pixels, table[n, view, :4].astype(np.int32), found[n, view], bool(view))
    return found.reshape(-1, side, side, 3), table.reshape(2 * count, -1)


def views(side: int, count: int) -> np.ndarray:
    pixels, table = crops(side, count)
    out = np.empty(pixels.shape, np.float32)
    cpu.augment_into(pixels, table, ViewSettings(resolution=side), out)
    return out


MADE = {
    "parameters": parameters,
    "crops, 32 px": lambda: crops(32, 40)[0],
    "crops, 224 px": lambda: crops(224, 8)[0],
    "views, 32 px": lambda: views(32, 40),
    "views, 33 px": lambda: views(33, 20),
    "views, 224 px": lambda: views(224, 8),
    "shrunk images": lambda: np.stack([shrink(image(600, 401, seed), 397, 265) for seed in range(3)]),
    "order of an epoch": lambda: epoch_order(10_000, 5, 2)(np.arange(10_000)),
}


@pytest.mark.parametrize("what", MADE)
def test_the_bits_are_those_of_every_processor(what):
    found = hashlib.sha256(np.ascontiguousarray(MADE[what]()).tobytes()).hexdigest()
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("LVSSL_RENEW_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {what: found}, indent=1) + "\n")
        return
    assert found == golden[what]


def test_exp_and_log_are_right_to_the_last_bits():
    """Against the C library's, which are within one unit in the last place of the truth."""
    for x in np.concatenate([np.linspace(-700, 700, 3001), np.linspace(-1, 1, 501)]):
        assert abs(exp(x) - math.exp(x)) <= 3 * math.ulp(math.exp(x)), x
    for x in np.concatenate([np.geomspace(1e-300, 1e300, 3001), np.linspace(0.4, 2.5, 501)]):
        assert abs(log(x) - math.log(x)) <= 4 * math.ulp(max(abs(math.log(x)), 0.25)), x
    assert exp(-1e6) == 0 and exp(0.0) == 1 and log(1.0) == 0
