"""The loader over a real beton: pixels by digest, whatever the workers, ranks, batches and resumptions."""

import hashlib
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from pipelines.convert.conversion import Settings, convert
from pipelines.errors import InputError
from pipelines.loader import TwoViewLoader, ViewBatch, evaluation_batches
from pipelines.sources import open_source
from pipelines.views import ViewSettings

VIEW = ViewSettings(resolution=24)
COUNT = 53


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """JPEGs of several sizes, some greyscale, and small PNGs, which are stored as raw pixels."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        target = folder / "pictures" / f"class{i % 3}"
        target.mkdir(parents=True, exist_ok=True)
        height, width = random.integers(30, 120, 2) if i % 4 else (32, 32)
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        if i % 5 == 0:
            image = image.convert("L")
        image.save(target / f"{i:03d}.{'jpg' if i % 4 else 'png'}", quality=92)
    convert(str(folder / "pictures"), folder / "set.beton", Settings())
    return folder / "set.beton"


def pixels_of(batches: list[ViewBatch]) -> dict[int, str]:
    """Digest of both views of each sample."""
    found = {}
    for batch in batches:
        for row, index in enumerate(batch.indices.tolist()):
            pixels = batch.views[:, row].contiguous().numpy().tobytes()
            assert index not in found, "a sample came twice"
            found[index] = hashlib.sha256(pixels + batch.parameters[row].numpy().tobytes()).hexdigest()
    return found


def epoch(beton, batch_size=7, epoch=0, step=0, **options) -> dict[int, str]:
    with TwoViewLoader(open_source(beton), VIEW, batch_size, **options) as loader:
        loader.set_position(epoch, step)
        return pixels_of(list(loader))


def test_a_batch_is_what_it_says(beton):
    source = open_source(beton)
    with TwoViewLoader(source, VIEW, 10) as loader:
        batch = next(iter(loader))
        assert len(loader) == 5
    assert batch.views.shape == (2, 10, 3, 24, 24) and batch.views.dtype == torch.float32
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
    assert batch.views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.labels.numpy(), source.labels[batch.indices.numpy()])
    assert batch.parameters.shape == (10, 2, 13)
    assert not torch.equal(batch.views[0], batch.views[1])


def test_workers_and_batch_size_change_no_pixel(beton):
    one = epoch(beton, 7, workers=1)
    assert len(one) == 49
    assert one == epoch(beton, 7, workers=2) == epoch(beton, 7, workers=4, ahead=1)
    other = epoch(beton, 53, workers=2)
    assert {i: other[i] for i in one} == one


def test_ranks_see_disjoint_parts_of_the_same_epoch(beton):
    whole = epoch(beton, 8)
    for ranks in (2, 4):
        parts = [epoch(beton, 8, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert sum(len(part) for part in parts) == len(whole)
        assert {i: d for part in parts for i, d in part.items()} == whole


def test_seed_and_epoch_change_the_pixels(beton):
    first = epoch(beton)
    for other in (epoch(beton, seed=1), epoch(beton, epoch=1)):
        assert all(other[i] != first[i] for i in set(first) & set(other))


def test_resumed_at_every_step_it_goes_on_as_if_nothing_had_happened(beton):
    def batches(loader):
        return [hashlib.sha256(b.views.numpy().tobytes()).hexdigest() for b in loader]

    with TwoViewLoader(open_source(beton), VIEW, 8, seed=3, workers=2) as loader:
        expected = batches(loader) + batches(loader)  # two epochs: iterating again goes on to the next
    for stop in range(len(expected)):
        with TwoViewLoader(open_source(beton), VIEW, 8, seed=3, workers=2) as loader:
            iterator, seen = iter(loader), 0
            while seen < stop:
                if next(iterator, None) is None:
                    iterator = iter(loader)
                else:
                    seen += 1
            state = loader.state_dict()
        with TwoViewLoader(open_source(beton), VIEW, 8, seed=3, workers=1) as loader:
            loader.load_state_dict(state)
            rest = batches(loader)
            while len(rest) < len(expected) - stop:
                rest += batches(loader)
        assert rest == expected[stop:], f"stopped after {stop} steps"


def test_crops_are_torchvisions(beton):
    """One decode, then torchvision's antialiased resized_crop of the same box: within rounding."""
    source = open_source(beton)
    indices = np.arange(len(source))
    random = np.random.default_rng(1)
    boxes = np.empty((len(source), 2, 4), np.int32)
    for i in indices:
        for v in range(2):
            height, width = (
                random.integers(5, source.heights[i] + 1),
                random.integers(5, source.widths[i] + 1),
            )
            top, left = (
                random.integers(0, source.heights[i] - height + 1),
                random.integers(0, source.widths[i] - width + 1),
            )
            boxes[i, v] = top, left, height, width
    ours = np.empty((len(source), 2, 24, 24, 3), np.uint8)
    source.crops(indices, boxes, ours)
    for i in indices:
        image = decoded(source, int(i))
        for v in range(2):
            theirs = tv.resized_crop(image, *boxes[i, v].tolist(), [24, 24], antialias=True)
            error = (theirs.permute(1, 2, 0).int() - torch.from_numpy(ours[i, v]).int()).abs()
            assert error.max() <= 1 and error.float().mean() < 0.3


def decoded(source, index: int) -> torch.Tensor:
    """The image through the same decoder, put together from squares that are not resized."""
    height, width = int(source.heights[index]), int(source.widths[index])
    image = torch.empty(3, height, width, dtype=torch.uint8)
    small = min(height, width)
    for top in range(0, height, small):
        for left in range(0, width, small):
            y, x = min(top, height - small), min(left, width - small)
            out = np.empty((1, 1, small, small, 3), np.uint8)
            source.crops(np.array([index]), np.array([[[y, x, small, small]]], np.int32), out)
            image[:, y : y + small, x : x + small] = torch.from_numpy(out[0, 0]).permute(2, 0, 1)
    return image


def test_evaluation_takes_every_image_once_in_order(beton):
    source = open_source(beton)
    batches = list(evaluation_batches(source, VIEW, batch_size=10, workers=2))
    assert np.array_equal(np.concatenate([indices for _, indices in batches]), np.arange(COUNT))
    again = list(evaluation_batches(source, VIEW, batch_size=7, workers=1))
    assert torch.equal(torch.cat([b for b, _ in batches]), torch.cat([b for b, _ in again]))


def test_threads_end_with_the_loader(beton):
    before = threading.active_count()
    for _ in range(3):
        with TwoViewLoader(open_source(beton), VIEW, 8, workers=3) as loader:
            next(iter(loader))
    assert threading.active_count() == before


def test_a_damaged_image_is_named_not_returned(beton, tmp_path):
    source = open_source(beton)
    victim = int(np.flatnonzero(source.file.modes == 0)[3])
    content = bytearray(beton.read_bytes())
    start, size = int(source.file.offsets[victim]), int(source.file.sizes[victim])
    content[start + size // 3 : start + size] = bytes(size - size // 3)
    (tmp_path / "damaged.beton").write_bytes(content)
    with TwoViewLoader(open_source(tmp_path / "damaged.beton"), VIEW, COUNT, workers=2) as loader:
        with pytest.raises(InputError, match=rf"damaged\.beton: sample {victim} can't be decoded"):
            list(loader)


def test_bad_input(beton, tmp_path):
    source = open_source(beton)
    with pytest.raises(InputError, match="larger than the data set of 53"):
        TwoViewLoader(source, VIEW, 54)
    with pytest.raises(InputError, match="multiple of the 2 rank"):
        TwoViewLoader(source, VIEW, 7, ranks=2)
    with pytest.raises(InputError, match="workers"):
        TwoViewLoader(source, VIEW, 7, workers=0)
    with pytest.raises(InputError, match="no such file|doesn't exist"):
        open_source(tmp_path / "none.beton")
    (tmp_path / "short.beton").write_bytes(beton.read_bytes()[:-1000])
    with pytest.raises(InputError, match="short.beton"):
        open_source(tmp_path / "short.beton")
