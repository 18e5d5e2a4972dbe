"""The augmentation against torchvision on the same parameters; the compiled form against the reference."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from pipelines.augment import augment, backend_for, cpu, reference
from pipelines.errors import InputError
from pipelines.parameters import (
    BRIGHTNESS,
    COLUMNS,
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
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
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


@pytest.mark.parametrize("side, count", [(8, 3), (33, 2), (224, 2), (511, 1)])
def test_every_size_and_order(side, count):
    """Each of the 24 orders, blurred and not, in colour and in grey, against the reference in fp64."""
    view = ViewSettings(resolution=side, **PLAIN)
    for order in range(0, 24, 1 if side < 64 else 7):
        table = identity(count)
        table[:, ORDER], table[:, [BRIGHTNESS, CONTRAST, SATURATION, HUE]] = order, (1.2, 0.7, 1.4, 0.15)
        table[:, SIGMA], table[:, GREY], table[:, FLIP] = 1.3 * (order % 2), order % 3 == 0, order % 5 == 0
        crops = images(count, side, order)
        exact = reference.augment(crops, torch.from_numpy(table), view, torch.float64)
        assert (run("cpu", crops, table, view) - exact).abs().max() < 1e-5, order


def test_fidelity_on_photographs():
    """The goal: within 1 level of torchvision on average, 3 at most, on uint8 too, which it rounds down."""
    from benchmarks.augmentation import OPERATIONS as NAMED
    from benchmarks.augmentation import errors

    found = errors(count=2)
    assert set(found) == {*NAMED, "chain"}
    for name, against in found.items():
        assert against["float"]["mean"] < 0.001 and against["float"]["max"] < 0.02, (name, against)
        if name != "chain":  # torchvision's own rounding adds up in its chain on uint8
            assert against["uint8"]["mean"] <= 1 and against["uint8"]["max"] <= 3, (name, against)


def test_the_draw_differs_from_view_to_view():
    view = ViewSettings()
    count = 64
    sizes = np.full(count, 300)
    table = draw_parameters(view, 0, 0, np.arange(count), sizes, sizes).reshape(2 * count, P)
    assert len(np.unique(table, axis=0)) == 2 * count
    sigmas = table[table[:, SIGMA] > 0, SIGMA]
    assert len(sigmas) > count / 2 and len(np.unique(sigmas)) == len(sigmas)


def test_the_blur_differs_from_image_to_image():
    table = identity(3)
    table[:, SIGMA] = (0.0, 0.5, 2.0)
    crops = images(1, 64).expand(3, -1, -1, -1).contiguous()
    sharp, soft, softer = augment(crops, torch.from_numpy(table), ViewSettings(resolution=64, **PLAIN))
    rough = [view.diff(dim=-1).abs().mean() for view in (sharp, soft, softer)]
    assert rough[0] > rough[1] > rough[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_call_for_both_forms_on_the_cpu(dtype):
    view = ViewSettings(resolution=32)
    crops, sizes = images(5, 32), np.full(5, 32)
    table = torch.from_numpy(draw_parameters(view, 0, 0, np.arange(5), sizes, sizes)[:, 0].copy())
    fast, exact = (augment(crops, table, view, backend, dtype) for backend in ("auto", "reference"))
    assert fast.dtype == dtype and fast.is_contiguous(memory_format=torch.channels_last)
    rounding = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    assert (fast.double() - exact.double()).abs().max() <= rounding[dtype]


def test_the_backend_follows_the_device():
    assert backend_for(torch.device("cpu")) == "numba"
    assert backend_for(torch.device("cuda")) == "triton"
    assert backend_for(torch.device("cuda"), "reference") == "reference"
    for device, wanted in (("cpu", "triton"), ("cuda", "numba"), ("cpu", "fastest")):
        with pytest.raises(InputError, match=wanted):
            backend_for(torch.device(device), wanted)


WRONG = [  # what is changed, and what the message must say
    (lambda c, t: (c.float(), t), "crops must be uint8, got float32"),
    (
        lambda c, t: (c.permute(0, 3, 1, 2), t),
        r"crops must have shape \[N, 16, 16, 3\], got \[4, 3, 16, 16\]",
    ),
    (lambda c, t: (c.transpose(1, 2), t), "crops must be contiguous"),
    (lambda c, t: (c[:, :8], t), "crops must have shape"),
    (lambda c, t: (c, t.double()), "table must be float32, got float64"),
    (lambda c, t: (c, t[:3]), rf"table must have shape \[4, {P}\] like crops, got \[3, {P}\]"),
    (lambda c, t: (c, t[:, :-1]), "table must have shape"),
    (lambda c, t: (c, t.to("meta")), "table is on meta, crops on cpu"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_wrong_arguments_are_named(change, message):
    crops, table = change(images(4, 16), torch.from_numpy(identity(4)))
    with pytest.raises(InputError, match=message):
        augment(crops, table, ViewSettings(resolution=16))


@pytest.mark.parametrize(
    "column, value",
    [(HUE, 0.6), (HUE, np.nan), (SIGMA, -1), (SIGMA, np.inf), (BRIGHTNESS, -0.1), (CONTRAST, np.nan),
     (ORDER, 24), (ORDER, 1.5), (FLIP, 2), (GREY, 0.5), (SOLARISE, -1), (SATURATION, np.inf)],
)  # fmt: skip
def test_the_first_wrong_parameter_is_named(column, value):
    table = identity(4)
    table[2:, column] = value
    table[3, FLIP] = 7  # later, so not the one that is named
    with pytest.raises(InputError, match=rf"table\[2, {column}\] \({COLUMNS[column]} of crop 2\)"):
        augment(images(4, 16), torch.from_numpy(table), ViewSettings(resolution=16))


def test_an_unknown_dtype_is_named():
    with pytest.raises(InputError, match="dtype must be one of float32, float16, bfloat16, got int32"):
        augment(images(1, 8), torch.from_numpy(identity(1)), ViewSettings(resolution=8), dtype=torch.int32)


@pytest.mark.parametrize("chosen", [np.s_[:, 1], np.s_[::-1, 0], np.s_[1:2, 0], np.s_[::3, 0]])
def test_crops_of_a_larger_array(chosen):
    """The loader's crops [B, 2, R, R, 3] by view, and other parts of them."""
    view = ViewSettings(resolution=24)
    both, sizes = images(12, 24).numpy().reshape(6, 2, 24, 24, 3), np.full(6, 24)
    table = draw_parameters(view, 0, 0, np.arange(6), sizes, sizes)
    crops, rows = both[chosen], table[chosen]
    out = np.empty(crops.shape, np.float32)
    cpu.augment_into(crops, rows, view, out)
    exact = reference.augment(torch.from_numpy(crops.copy()), torch.from_numpy(rows.copy()), view)
    assert np.abs(out - exact.permute(0, 2, 3, 1).numpy()).max() < 1e-4
