"""The augmentation against torchvision on the same parameters; the compiled form against the reference."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from pipelines.augment import cpu, reference
from pipelines.parameters import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GREY,
    HUE,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARISE,
    P,
    draw_parameters,
)  # fmt: skip
from pipelines.views import ViewSettings

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Smooth colour images with some saturated, black, white and grey pixels: uint8 [N, R, R, 3]."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.random((count, 3, 5, 5), np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    batch = (smooth * 300 - 20).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    batch[:, 0, 0], batch[:, 0, 1], batch[:, 1, 0] = 0, 255, 128
    return batch


def identity(count: int) -> np.ndarray:
    table = np.zeros((count, P), np.float32)
    table[:, [BRIGHTNESS, CONTRAST, SATURATION]] = 1
    return table


OPERATIONS = [
    (BRIGHTNESS, 0.3, lambda x: tv.adjust_brightness(x, 0.3)),
    (BRIGHTNESS, 1.7, lambda x: tv.adjust_brightness(x, 1.7)),
    (CONTRAST, 0.2, lambda x: tv.adjust_contrast(x, 0.2)),
    (CONTRAST, 1.8, lambda x: tv.adjust_contrast(x, 1.8)),
    (SATURATION, 0.0, lambda x: tv.adjust_saturation(x, 0.0)),
    (SATURATION, 1.8, lambda x: tv.adjust_saturation(x, 1.8)),
    (HUE, -0.2, lambda x: tv.adjust_hue(x, -0.2)),
    (HUE, 0.13, lambda x: tv.adjust_hue(x, 0.13)),
    (HUE, 0.5, lambda x: tv.adjust_hue(x, 0.5)),
    (GREY, 1, lambda x: tv.rgb_to_grayscale(x, 3)),
    (FLIP, 1, tv.horizontal_flip),
    (SOLARISE, 1, lambda x: tv.solarize(x, 128 / 255)),
    (SIGMA, 0.1, lambda x: tv.gaussian_blur(x, [3, 3], [0.1, 0.1])),
    (SIGMA, 2.0, lambda x: tv.gaussian_blur(x, [3, 3], [2.0, 2.0])),
]


@pytest.mark.parametrize("column, value, torchvision_form", OPERATIONS)
@pytest.mark.parametrize("form", ["reference", "cpu"])
def test_each_operation_is_torchvisions(column, value, torchvision_form, form):
    crops = images(3, 32)
    table = identity(3)
    table[:, column] = value
    view = ViewSettings(resolution=32, **PLAIN)
    expected = torchvision_form(crops.permute(0, 3, 1, 2).float() / 255)
    got = run(form, crops, table, view)
    assert (got - expected).abs().max() <= 2e-5 + 1e-5 * (column == HUE)


def run(form: str, crops: torch.Tensor, table: np.ndarray, view: ViewSettings) -> torch.Tensor:
    if form == "reference":
        return reference.augment(crops, torch.from_numpy(table), view)
    out = np.empty(crops.shape, np.float32)
    cpu.augment_into(crops.numpy(), table, view, out)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


@pytest.mark.parametrize("side", [8, 28, 33, 64])  # one tap; three; an odd side; seven taps
def test_the_compiled_chain_is_the_reference(side):
    view = ViewSettings(resolution=side, solarise=0.3)
    crops = images(40, side)
    sizes = np.full(40, side)
    table = draw_parameters(view, 3, 1, np.arange(40), sizes, sizes)[:, 1].copy()
    difference = (run("cpu", crops, table, view) - run("reference", crops, table, view)).abs()
    near_threshold = (
        difference > 1e-3
    )  # solarise is a step: a value within rounding of 0.5 may fall on either side
    assert near_threshold.float().mean() < 1e-3
    assert difference[~near_threshold].max() < 1e-4


def test_the_chain_on_uint8_is_within_torchvisions_rounding():
    """torchvision on uint8 cuts off the fraction after every operation: half a level lost each time."""
    side, count = 32, 60
    view = ViewSettings(resolution=side, **PLAIN)
    crops = images(count, side)
    sizes = np.full(count, side)
    table = draw_parameters(view, 5, 0, np.arange(count), sizes, sizes)[:, 0].copy()
    ours = reference.augment(crops, torch.from_numpy(table), view)
    theirs = torch.stack([torchvision_chain(crops[i].permute(2, 0, 1), table[i], view) for i in range(count)])
    error = (ours - theirs.float() / 255).abs() * 255
    assert error.mean() < 1.5
    assert error.flatten()[::7].quantile(0.999) < 8.0


def torchvision_chain(image: torch.Tensor, p: np.ndarray, view: ViewSettings) -> torch.Tensor:
    steps = (
        lambda x: tv.adjust_brightness(x, float(p[BRIGHTNESS])),
        lambda x: tv.adjust_contrast(x, float(p[CONTRAST])),
        lambda x: tv.adjust_saturation(x, float(p[SATURATION])),
        lambda x: tv.adjust_hue(x, float(p[HUE])),
    )
    if p[FLIP]:
        image = tv.horizontal_flip(image)
    for operation in reference.ORDERS[int(p[ORDER])]:
        image = steps[operation](image)
    if p[GREY]:
        image = tv.rgb_to_grayscale(image, 3)
    if p[SIGMA] > 0:
        image = tv.gaussian_blur(image, [view.kernel_size] * 2, [float(p[SIGMA])] * 2)
    return image


def test_an_empty_batch_and_a_single_image():
    view = ViewSettings(resolution=8)
    for count in (0, 1):
        for form in ("reference", "cpu"):
            assert run(form, images(count, 8), identity(count), view).shape == (count, 3, 8, 8)
