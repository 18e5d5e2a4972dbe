"""The loader over a real beton: pixels by digest, whatever the workers, ranks, batches and resumptions."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import on_cpu_and_gpu
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from pipelines import cores
from pipelines.augment import augmenter_for, reference
from pipelines.convert.conversion import Settings, convert
from pipelines.decode import open_reader
from pipelines.decode.beton import BetonReader
from pipelines.errors import InputError
from pipelines.loader import (
    AHEAD,
    RUN_AHEAD,
    LoaderSettings,
    TwoViewLoader,
    ViewBatch,
    _OnDevice,
    evaluation_batches,
)
from pipelines.order import epoch_order, step_indices
from pipelines.parameters import FLIP, crop_boxes
from pipelines.views import ViewSettings

VIEW = ViewSettings(resolution=24)
COUNT = 53


def pixels_of(batches: list[ViewBatch]) -> dict[int, str]:
    """Digest of both views of each sample."""
    found = {}
    for batch in batches:
        for row, index in enumerate(batch.indices.tolist()):
            pixels = batch.views[:, row].contiguous().numpy().tobytes()
            assert index not in found, "a sample came twice"
            found[index] = hashlib.sha256(pixels + batch.parameters[row].numpy().tobytes()).hexdigest()
    return found


def epoch(path, batch_size=7, epoch=0, step=0, kind="auto", **options) -> dict[int, str]:
    with TwoViewLoader(open_reader(path, kind), VIEW, LoaderSettings(batch_size, **options)) as loader:
        loader.set_position(epoch, step)
        return pixels_of(list(loader))


def test_a_batch_is_what_it_says(beton):
    source = open_reader(beton)
    with TwoViewLoader(source, VIEW, LoaderSettings(10, device=torch.device("cpu", 0))) as loader:
        batch = next(iter(loader))
        assert len(loader) == 5
    assert batch.views.shape == (2, 10, 3, 24, 24) and batch.views.dtype == torch.float32
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
    assert batch.views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.labels.numpy(), source.labels[batch.indices.numpy()])
    assert batch.parameters.shape == (10, 2, 13)
    assert torch.equal(batch.to("cpu").views, batch.views)  # as in torch, a device may be text
    with pytest.raises(RuntimeError, match="the loader is closed: make a new one"):
        next(iter(loader))
    assert not torch.equal(batch.views[0], batch.views[1])


@pytest.mark.parametrize("kind", ["beton", "folder"])
def test_workers_and_batch_size_change_no_pixel(sources, kind):
    path = sources[kind]
    one = epoch(path, 7, workers=1)
    assert len(one) == 49
    assert one == epoch(path, 7, workers=2) == epoch(path, 7, workers=4)
    for size in (32, 53):
        other = epoch(path, size, workers=2)
        shared = set(one) & set(other)
        assert len(shared) >= min(size, 49) - 4 and all(one[i] == other[i] for i in shared)


@pytest.mark.parametrize("kind", ["beton", "folder", "shards", "dali"])
@pytest.mark.parametrize("order", ["random", "quasi-random", "sequential"])
def test_ranks_see_disjoint_parts_of_the_same_epoch(sources, kind, order):
    """They cover all but what is left over of a batch, or, with batches of one, everything."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    how = {"order": order, "kind": "dali" if kind == "dali" else "auto"}
    path = sources["shards" if kind == "dali" else kind]
    whole = epoch(path, 8, **how)
    assert len(whole) == 48
    for ranks in (2, 4):
        parts = [epoch(path, 8, rank=rank, ranks=ranks, **how) for rank in range(ranks)]
        assert sum(len(part) for part in parts) == len(whole)
        assert {i: d for part in parts for i, d in part.items()} == whole
    everything = epoch(path, 1, **how)
    assert set(everything) == set(range(COUNT)) and everything.items() >= whole.items()


def test_files_and_beton_give_the_same_boxes_and_pixels(sources):
    """The converter keeps JPEGs' bytes, and small PNGs' pixels: not one bit differs."""
    files, beton = open_reader(sources["folder"]), open_reader(sources["beton"])
    assert np.array_equal(files.labels, beton.labels)
    assert epoch(sources["folder"]) == epoch(sources["beton"])


def test_seed_and_epoch_change_the_pixels(beton):
    first = epoch(beton)
    for other in (epoch(beton, seed=1), epoch(beton, epoch=1)):
        assert all(other[i] != first[i] for i in set(first) & set(other))


def test_resumed_at_every_step_it_goes_on_as_if_nothing_had_happened(beton):
    def batches(loader):
        return [hashlib.sha256(b.views.numpy().tobytes()).hexdigest() for b in loader]

    with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(8, seed=3, workers=2)) as loader:
        expected = batches(loader) + batches(loader)  # two epochs: iterating again goes on to the next
    for stop in range(len(expected)):
        with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(8, seed=3, workers=2)) as loader:
            iterator, seen = iter(loader), 0
            while seen < stop:
                if next(iterator, None) is None:
                    iterator = iter(loader)
                else:
                    seen += 1
            state = loader.state_dict()
        with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(8, seed=3, workers=1)) as loader:
            loader.load_state_dict(state)
            rest = batches(loader)
            while len(rest) < len(expected) - stop:
                rest += batches(loader)
        assert rest == expected[stop:], f"stopped after {stop} steps"


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """270 small JPEGs as a beton: eight batches of 32, four of 64."""
    folder = tmp_path_factory.mktemp("larger")
    random = np.random.default_rng(3)
    (folder / "pictures" / "all").mkdir(parents=True)
    for i in range(270):
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = tuple(random.integers(20, 60, 2).tolist())
        Image.fromarray(coarse).resize(size, 3).save(folder / "pictures" / "all" / f"{i:03d}.jpg")
    convert(str(folder / "pictures"), folder / "set.beton", Settings())
    return folder / "set.beton"


@pytest.mark.parametrize("batch_size", [32, 64])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_worker_rank_and_batch_resumed_at_every_step_sees_the_same_pixels(
    larger, workers, ranks, batch_size
):
    """The state after each step goes to a loader with another number of workers, which ends the epoch."""
    truth = epoch(larger, 1, epoch=2, workers=1)
    assert len(truth) == 270
    order = epoch_order(270, 0, 2)
    steps = 270 // batch_size
    for rank in range(ranks):
        how = {"rank": rank, "ranks": ranks}
        mine = [step_indices(order, step, batch_size, rank, ranks).tolist() for step in range(steps)]
        states = []
        with TwoViewLoader(
            open_reader(larger), VIEW, LoaderSettings(batch_size, workers=workers, **how)
        ) as loader:
            loader.set_epoch(2)
            for _ in loader:
                states.append(loader.state_dict())
        for stop, state in enumerate([{"epoch": 2, "step": 0}, *states[:-1]]):
            with TwoViewLoader(
                open_reader(larger), VIEW, LoaderSettings(batch_size, workers=5 - workers, **how)
            ) as loader:
                loader.load_state_dict(state)
                batches = list(loader)
            assert [batch.indices.tolist() for batch in batches] == mine[stop:]
            assert pixels_of(batches).items() <= truth.items(), f"resumed behind step {stop}"


def test_crops_are_torchvisions(beton):
    """One decode, then torchvision's antialiased resized_crop of the same box: within rounding."""
    source = open_reader(beton)
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
    source = open_reader(beton)
    batches = list(evaluation_batches(source, VIEW, batch_size=10, workers=2))
    assert np.array_equal(np.concatenate([indices for _, indices in batches]), np.arange(COUNT))
    again = list(evaluation_batches(source, VIEW, batch_size=7, workers=1))
    assert torch.equal(torch.cat([b for b, _ in batches]), torch.cat([b for b, _ in again]))


def test_threads_end_with_the_loader(beton):
    before = threading.active_count()
    for _ in range(3):
        with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(8, workers=3)) as loader:
            next(iter(loader))
    assert threading.active_count() == before


def test_a_damaged_image_is_named_not_returned(beton, tmp_path):
    source = open_reader(beton)
    victim = int(np.flatnonzero(source.file.modes == 0)[3])
    content = bytearray(beton.read_bytes())
    start, size = int(source.file.offsets[victim]), int(source.file.sizes[victim])
    content[start + size // 3 : start + size] = bytes(size - size // 3)
    (tmp_path / "damaged.beton").write_bytes(content)
    with TwoViewLoader(
        open_reader(tmp_path / "damaged.beton"), VIEW, LoaderSettings(COUNT, workers=2)
    ) as loader:
        with pytest.raises(InputError, match=rf"damaged\.beton: sample {victim} can't be decoded"):
            list(loader)


def damage(beton, target, victims: list[int], share: float = 1 / 3) -> None:
    """A copy in which some images are zeros from `share` of their bytes on."""
    source, content = open_reader(beton), bytearray(beton.read_bytes())
    for victim in victims:
        start, size = int(source.file.offsets[victim]), int(source.file.sizes[victim])
        content[start + int(size * share) : start + size] = bytes(size - int(size * share))
    target.write_bytes(content)


@pytest.mark.parametrize("share", [0, 0.002, 1 / 3])  # no header; half a header; a header and half an image
def test_skipped_samples_are_replaced_by_the_next_good_one(beton, tmp_path, share):
    source = open_reader(beton)
    jpegs = np.flatnonzero(source.file.modes == 0)
    first = next(int(i) for i in jpegs[2:] if i + 1 in jpegs)
    bad = [first, first + 1, int(jpegs[-1])]  # two in a row, and one near the end of the set
    damage(beton, tmp_path / "damaged.beton", bad, share)
    good = epoch(beton, COUNT)
    digests, seen = [], []
    for workers in (1, 2, 4):
        with TwoViewLoader(
            open_reader(tmp_path / "damaged.beton"),
            VIEW,
            LoaderSettings(COUNT, workers=workers, on_error="skip"),
        ) as loader:
            (batch,) = list(loader)
            assert loader.skipped == len(bad) and set(loader.damaged) == set(bad)
            assert all("can't be decoded (" in why for why in loader.damaged.values())
        indices = batch.indices.tolist()
        assert not set(indices) & set(bad) and len(indices) == COUNT
        assert np.array_equal(batch.labels.numpy(), source.labels[indices])
        for row, index in enumerate(indices):  # every pixel is the undamaged set's: nothing is garbage
            pixels = batch.views[:, row].contiguous().numpy().tobytes()
            assert hashlib.sha256(pixels + batch.parameters[row].numpy().tobytes()).hexdigest() == good[index]
        seen.append(indices)
        digests.append(hashlib.sha256(batch.views.numpy().tobytes()).hexdigest())
    assert seen[0] == seen[1] == seen[2] and len(set(digests)) == 1
    repeated = [index for index in set(seen[0]) if seen[0].count(index) > 1]
    following = [next(i % COUNT for i in range(b, b + COUNT) if i % COUNT not in bad) for b in bad]
    assert sorted(repeated) == sorted(set(following))


def test_a_set_of_nothing_but_damage_ends_with_an_error(beton, tmp_path):
    source = open_reader(beton)
    content = bytearray(beton.read_bytes())
    for start, size in zip(source.file.offsets.tolist(), source.file.sizes.tolist()):
        content[start : start + size] = bytes(size)
    (tmp_path / "damaged.beton").write_bytes(content)
    only_jpegs = open_reader(tmp_path / "damaged.beton")
    only_jpegs.file.modes[:] = 0
    with TwoViewLoader(only_jpegs, VIEW, LoaderSettings(8, on_error="skip")) as loader:
        with pytest.raises(InputError, match="none of 53 samples can be decoded"):
            list(loader)


def test_an_entry_of_another_size_is_named_not_returned(beton, tmp_path):
    """A JPEG that is whole, but not of the size that the table says: FFCV's decoder gives garbage here."""
    source = open_reader(beton)
    victim = int(np.flatnonzero(source.file.modes == 0)[0])
    source.heights[victim] -= 9
    out = np.empty((1, 1, 8, 8, 3), np.uint8)
    with pytest.raises(InputError, match=rf"sample {victim} can't be decoded \(a JPEG of .* entry says"):
        source.crops(np.array([victim]), np.array([[[0, 0, 5, 5]]], np.int32), out)


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 0, 5), (0, 0, 400, 5), (0, 28, 5, 5)])
@pytest.mark.parametrize("kind", ["beton", "folder"])
def test_a_box_outside_of_the_image_is_refused(sources, kind, box):
    out = np.empty((1, 1, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="do not lie within"):
        open_reader(sources[kind]).crops(np.array([0]), np.array([[box]], np.int32), out)


def test_flips_mirror_the_crops(sources):
    for path in sources.values():
        out = np.empty((2, 1, 9, 9, 3), np.uint8)
        box = np.array([[[1, 2, 25, 20]]], np.int32)
        source = open_reader(path)
        source.crops(np.array([1]), box, out[:1])
        source.crops(np.array([1]), box, out[1:], np.array([[True]]))
        assert np.array_equal(out[0], out[1, :, :, ::-1])


def test_crops_alone_and_an_augmenter_of_ones_own(beton):
    """uint8 crops mirrored as the table says; and the reference, called with what the loader hands over."""
    source = open_reader(beton)
    with TwoViewLoader(source, VIEW, LoaderSettings(16, crops_only=True)) as loader:
        crops = next(iter(loader))
    with TwoViewLoader(source, VIEW, LoaderSettings(16, augmenter=reference.augment)) as loader:
        slow = next(iter(loader))
    with TwoViewLoader(source, VIEW, LoaderSettings(16)) as loader:
        fast = next(iter(loader))
    assert crops.views.dtype == torch.uint8 and crops.views.shape == (2, 16, 3, 24, 24)
    plain = np.empty((16, 2, 24, 24, 3), np.uint8)
    source.crops(crops.indices.numpy(), crop_boxes(crops.parameters.numpy()), plain)
    for row in range(16):
        for v in range(2):
            expected = torch.from_numpy(plain[row, v]).permute(2, 0, 1)
            flipped = expected.flip(-1) if crops.parameters[row, v, FLIP] else expected
            assert torch.equal(crops.views[v, row], flipped)
    once = reference.augment(torch.from_numpy(plain).flatten(0, 1), slow.parameters.flatten(0, 1), VIEW)
    assert torch.equal(slow.views, once.unflatten(0, (16, 2)).transpose(0, 1))  # no view is mirrored twice
    assert torch.equal(slow.parameters, fast.parameters) and slow.views.shape == fast.views.shape
    assert (slow.views - fast.views).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_views_come_in_the_dtype_of_the_training(beton, dtype):
    augmenter = augmenter_for(torch.device("cpu"), "reference", dtype)
    with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(8, augmenter=augmenter)) as loader:
        batch = next(iter(loader))
    with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(8, augmenter=reference.augment)) as loader:
        exact = next(iter(loader))
    assert batch.views.dtype == dtype
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
    assert torch.equal(batch.views, exact.views.to(dtype))


def test_a_batch_that_is_kept_isnt_overwritten(beton):
    """Memory comes back to the loader only when nobody has it any more, be it a slice of it."""
    with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(8)) as loader:
        kept = [(batch.views[1, 3:5], batch.views[1, 3:5].clone()) for batch in loader]
        list(loader)
        assert all(torch.equal(view, copy) for view, copy in kept)
        del kept
        places = {batch.views.data_ptr() for _ in range(4) for batch in loader}
    assert len(places) <= 6 + AHEAD + 2  # 24 batches


def test_a_failure_in_a_worker_arrives_at_once(beton):
    class Broken(BetonReader):
        def crops(self, *_):
            raise RuntimeError("a worker broke")

    with TwoViewLoader(Broken(beton), VIEW, LoaderSettings(8, workers=3)) as loader:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="a worker broke"):
            next(iter(loader))
    assert time.monotonic() - started < 5


def test_a_second_process_compiles_nothing(beton):
    """Compiled code comes from the disk, so that the first batch is there at once."""
    script = """if True:
        import sys
        from numba.core import event
        from pipelines.loader import LoaderSettings, TwoViewLoader
        from pipelines.decode import open_reader
        from pipelines.views import ViewSettings
        with event.install_recorder("numba:compile") as compiled:
            source, view = open_reader(sys.argv[1]), ViewSettings(resolution=24)
            with TwoViewLoader(source, view, LoaderSettings(8)) as loader:
                next(iter(loader))
        print(len(compiled.buffer))
    """
    command = [sys.executable, "-c", script, str(beton)]
    for _ in range(2):  # the first process compiles where nothing has done so yet
        compiled = int(subprocess.run(command, check=True, capture_output=True).stdout)
    assert compiled == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_batches_are_those_of_the_cpu(beton):
    source = open_reader(beton)
    with TwoViewLoader(source, VIEW, LoaderSettings(8, augmenter=reference.augment)) as loader:
        expected = list(loader)
    with TwoViewLoader(source, VIEW, LoaderSettings(8, augmenter=reference.augment, device="cuda")) as loader:
        found = list(loader)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours.views.is_cuda and torch.equal(ours.indices.cpu(), theirs.indices)
        assert torch.equal(ours.to(torch.device("cpu")).views, ours.views.cpu())
        assert (ours.views.cpu() - theirs.views).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_batches_stay_right_while_the_host_runs_ahead(beton):
    """The device is kept busy, so that memory given back too early would be overwritten. No hidden wait."""
    augmenter = augmenter_for(torch.device("cuda"), dtype=torch.bfloat16)
    with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(4, augmenter=reference.augment)) as loader:
        expected = [batch.views for batch in loader]
    with TwoViewLoader(
        open_reader(beton), VIEW, LoaderSettings(4, augmenter=augmenter, device="cuda")
    ) as loader:
        list(loader)  # kernels compiled, constants copied
        loader.set_epoch(0)
        kept = []
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in loader:
                torch.cuda._sleep(20_000_000)
                kept.append(batch.views.clone())
                del batch
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(kept, expected, strict=True):
        assert ours.dtype == torch.bfloat16 and (ours.cpu().float() - theirs).abs().max() < 0.03


def test_bad_input(beton, tmp_path):
    source = open_reader(beton)
    with pytest.raises(InputError, match="larger than the data set of 53"):
        TwoViewLoader(source, VIEW, LoaderSettings(54))
    with pytest.raises(InputError, match="multiple of the 2 rank"):
        TwoViewLoader(source, VIEW, LoaderSettings(7, ranks=2))
    with pytest.raises(InputError, match="unknown order 'shuffled'"):
        TwoViewLoader(source, VIEW, LoaderSettings(7, order="shuffled"))
    with pytest.raises(InputError, match="raise or skip"):
        TwoViewLoader(source, VIEW, LoaderSettings(7, on_error="ignore"))
    for settings, said in [
        (LoaderSettings(8, ranks=0), "ranks must be at least 1"),
        (LoaderSettings(8, seed=-1), r"--seed must be in \[0, 2\^64\), got -1"),
        (LoaderSettings(8, views=0), "views must be 1 or 2, got 0"),
        (LoaderSettings(8.0), "batch_size must be a whole number, got 8.0"),
        (LoaderSettings(8, seed="1"), "seed must be a whole number, got '1'"),
        (LoaderSettings(8, device="mps"), "device must be cpu .*here, got 'mps'"),
        (LoaderSettings(8, device="cuda:99"), "device must be cpu .*here, got 'cuda:99'"),
    ]:
        with pytest.raises(InputError, match=said):
            TwoViewLoader(source, VIEW, settings)
    for path in (beton, str(beton)):
        with pytest.raises(InputError, match=rf"source must be a Reader, such as open_reader\('{beton}'\)"):
            TwoViewLoader(path, VIEW, LoaderSettings(2))
    for pair in (0.5, (0.5,), (0.9, 0.5)):
        with pytest.raises(InputError, match=r"view\.scale must be an increasing pair in \(0, 1\.0\], got"):
            TwoViewLoader(source, ViewSettings(24, scale=pair), LoaderSettings(8))
    ViewSettings(scale=[0.5, 0.9], ratio=np.array([0.5, 2])).validate()
    with pytest.raises(InputError, match="rank must be in"):
        TwoViewLoader(source, VIEW, LoaderSettings(8, rank=2, ranks=2))
    with (
        TwoViewLoader(source, VIEW, LoaderSettings(7)) as loader,
        pytest.raises(InputError, match="no step 9"),
    ):
        loader.load_state_dict({"epoch": 0, "step": 9})
    with pytest.raises(InputError, match="workers"):
        TwoViewLoader(source, VIEW, LoaderSettings(7, workers=-1))
    with pytest.raises(InputError, match="no such file|doesn't exist"):
        open_reader(tmp_path / "none.beton")
    (tmp_path / "short.beton").write_bytes(beton.read_bytes()[:-1000])
    with pytest.raises(InputError, match="short.beton"):
        open_reader(tmp_path / "short.beton")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["beton", "folder"])
def test_memory_is_flat_over_fifty_epochs(sources, kind):
    """At 96 px a batch has 3.5 MB: one kept each epoch would be seen. Threads are back after close()."""
    threads = threading.active_count()
    with TwoViewLoader(
        open_reader(sources[kind]), ViewSettings(resolution=96), LoaderSettings(16, workers=2)
    ) as loader:
        for number in range(50):
            assert sum(1 for _ in loader) == 3
            if number == 9:  # everything compiled, all buffers there
                before = resident()
        grown = resident() - before
    assert loader.epoch == 50 and grown < 8 << 20, f"{grown / 2**20:.1f} MB more"
    assert threading.active_count() == threads


def test_an_iteration_that_is_left_early_leaves_nothing_behind(beton):
    threads = threading.active_count()
    with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(8, workers=3)) as loader:
        for number in range(30):
            loader.set_epoch(number)
            for _ in loader:
                break
        assert loader.state_dict() == {"epoch": 29, "step": 1}
    assert threading.active_count() == threads


# -- on a GPU -------------------------------------------------------------------------------------


@on_cpu_and_gpu
def test_one_stream_a_loader_and_a_host_that_does_not_run_away(beton, monkeypatch, device):
    """Two epochs on one side stream, with a bound on the batches that are launched and not over; the batches
    are those of a CPU. On a CPU torch.cuda's streams and events do nothing but count."""
    view, plain = ViewSettings(resolution=32), BetonReader(beton)
    with TwoViewLoader(plain, view, LoaderSettings(8, workers=1)) as loader:
        expected = [batch.indices for _ in range(2) for batch in loader]
    streams, open_ends, most = [], [], []
    made = torch.cuda.Stream, torch.cuda.Event
    on_gpu = device == "cuda"

    class End:
        def __init__(self, blocking: bool = False) -> None:
            self.event = made[1](blocking=blocking) if on_gpu else None
            if blocking:
                open_ends.append(self)
                most.append(len(open_ends))

        def record(self, stream: object) -> None:
            if on_gpu:
                self.event.record(stream)

        def wait(self, stream: object) -> None:
            if on_gpu:
                self.event.wait(stream)

        def synchronize(self) -> None:
            if on_gpu:
                self.event.synchronize()
            open_ends.remove(self)

    class Stream:
        def wait_event(self, event: End) -> None: ...

    def stream(*given: object, **current: object) -> object:
        if current:  # torch itself, of the current stream
            return made[0](**current)
        (device,) = given
        streams.append(device)
        return made[0](device) if on_gpu else Stream()

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "Event", End)
    if not on_gpu:
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    with TwoViewLoader(plain, view, LoaderSettings(8, workers=1, device=device)) as loader:
        if not on_gpu:
            loader._on_device = _OnDevice(torch.device(device))
        found = [batch.indices.cpu() for _ in range(2) for batch in loader]
    assert len(streams) == 1
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(expected, found))
    assert len(most) == len(found) and max(most) == RUN_AHEAD + 1 and len(open_ends) == RUN_AHEAD


def test_threads_are_this_process_s_share_of_the_cores(monkeypatch):
    """torchrun's processes share the machine; two cores are left to the training."""
    for count, ranks, wanted in ((1, 1, 2), (2, 1, 2), (16, 1, 12), (64, 8, 6), (16, 8, 2)):
        monkeypatch.setattr(cores, "cores", lambda count=count: count)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert cores.loader_threads() == wanted
        assert cores.loader_threads(3) == 3
    for said in ("", "two", "0"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        assert cores.loader_threads() == 12, said


def test_after_a_fork_a_loader_says_so_instead_of_waiting_forever(beton):
    with TwoViewLoader(open_reader(beton), VIEW, LoaderSettings(8, workers=2)) as loader:
        next(iter(loader))
        child = os.fork()
        if not child:
            signal.alarm(60)  # ends a child that waits
            try:
                next(iter(loader))
            except RuntimeError as error:
                os._exit(7 if "make one in each process" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert len(list(loader)) == len(loader) - 1
