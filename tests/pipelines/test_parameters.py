"""Philox against its authors' vectors; each column's distribution against torchvision's own sampler."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import v2

from pipelines.errors import InputError
from pipelines.kernels.philox import philox
from pipelines.parameters import COLUMNS, centre_boxes, crop_boxes, draw_parameters, philox_compiled
from pipelines.views import ViewSettings

N = 4000
COLUMN = {name: i for i, name in enumerate(COLUMNS)}


def table(view: ViewSettings, count: int = N, height: int = 375, width: int = 500, **key: int) -> np.ndarray:
    sizes = np.full(count, height), np.full(count, width)
    return draw_parameters(view, key.get("seed", 0), key.get("epoch", 0), np.arange(count), *sizes)


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # known answers of Random123, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert philox(*counter, *key) == expected
    assert philox_compiled(*map(np.int64, (*counter, *key))) == expected
    for tensors in (lambda word: np.array([word]), lambda word: torch.tensor([word])):
        assert tuple(words.item() for words in philox(*map(tensors, (*counter, *key)))) == expected


def test_a_row_depends_on_seed_epoch_index_and_view_alone():
    view = ViewSettings()
    whole = table(view, 50)
    sizes = np.full(3, 375), np.full(3, 500)
    some = draw_parameters(view, 0, 0, np.array([40, 7, 7]), *sizes)
    assert np.array_equal(some, whole[[40, 7, 7]])
    assert not np.array_equal(whole[:, 0], whole[:, 1])
    assert not np.array_equal(whole, table(view, 50, epoch=1))
    assert not np.array_equal(whole, table(view, 50, seed=1))
    assert not np.array_equal(whole, table(view, 50, seed=2**40))  # the key's high word counts too


def test_no_two_images_share_parameters():
    drawn = table(ViewSettings(jitter=1.0, blur=1.0)).reshape(2 * N, -1)
    for name in ("brightness", "contrast", "saturation", "hue", "sigma"):
        assert len(np.unique(drawn[:, COLUMN[name]])) > 0.999 * len(drawn)


@pytest.mark.parametrize("height, width, ratio", [
    *((*size, (3 / 4, 4 / 3)) for size in [(375, 500), (500, 333), (32, 32), (40, 400), (1, 1)]),
    (300, 300, (0.5, 3.0)),  # width / height, not the other way round
    (400, 40, (0.5, 3.0)),
])  # fmt: skip
def test_crop_boxes_follow_torchvision(height, width, ratio):
    view = ViewSettings(ratio=ratio)
    ours = crop_boxes(table(view, N, height, width))[:, 0]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    transform = v2.RandomResizedCrop(224, scale=view.scale, ratio=view.ratio)
    drawn = [transform.make_params([image]) for _ in range(N)]
    theirs = np.array([[each[name] for name in ("top", "left", "height", "width")] for each in drawn])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    ours, theirs = (np.column_stack([of, of[:, 3] / of[:, 2]]) for of in (ours, theirs))
    for column in range(5):
        if len(np.unique(theirs[:, column])) == 1:
            assert np.array_equal(np.unique(ours[:, column]), np.unique(theirs[:, column]))
        else:  # a uniform ratio, or height / width, gives p < 1e-6 in the last column
            assert ks_2samp(ours[:, column], theirs[:, column], method="asymp").pvalue > 1e-4


def test_colour_parameters_have_torchvisions_ranges():
    view = ViewSettings(jitter=1.0, blur=1.0)
    drawn = table(view)[:, 1]
    for name, low, high in [
        ("brightness", 0.2, 1.8), ("contrast", 0.2, 1.8), ("saturation", 0.2, 1.8), ("hue", -0.2, 0.2),
        ("sigma", 0.1, 2.0),
    ]:  # fmt: skip
        assert kstest(drawn[:, COLUMN[name]], "uniform", args=(low, high - low)).pvalue > 1e-4, name
    orders = np.bincount(drawn[:, COLUMN["order"]].astype(int), minlength=24)
    assert len(orders) == 24 and orders.min() > 0.6 * N / 24


@pytest.mark.parametrize("name, column, off", [
    ("flip", "flip", 0), ("grey", "grey", 0), ("solarise", "solarise", 0), ("blur", "sigma", 0),
    ("jitter", "brightness", 1),
])  # fmt: skip
def test_probabilities(name, column, off):
    for probability in (0.0, 0.3, 1.0):
        applied = (table(ViewSettings(**{name: probability}))[:, 0, COLUMN[column]] != off).mean()
        assert abs(applied - probability) < 4 * np.sqrt(probability * (1 - probability) / N) + 1e-9


def test_an_image_without_jitter_keeps_its_colours():
    drawn = table(ViewSettings(jitter=0.0))[:, 0]
    for name, value in [("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0), ("order", 0)]:
        assert (drawn[:, COLUMN[name]] == value).all()


def test_centre_boxes():
    assert centre_boxes(np.array([375, 1]), np.array([500, 9]), 0.875).tolist() == [
        [[23, 86, 328, 328]],
        [[0, 4, 1, 1]],
    ]


@pytest.mark.parametrize("setting", [
    {"resolution": 7}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 1.2)}, {"flip": 1.5}, {"hue": 0.6},
    {"brightness": -1.0},
    {"sigma": (0.0, 1.0)}, {"evaluation_crop": 0.0}, {"std": (0.0, 1.0, 1.0)}, {"flip": float("nan")},
    {"std": (0.5,)}, {"std": (0.5, 0.5, float("nan"))}, {"mean": (0.5,)}, {"mean": (0.5, 0.5, float("inf"))},
])  # fmt: skip
def test_impossible_settings_are_refused_by_name(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        ViewSettings(**setting).validate()
