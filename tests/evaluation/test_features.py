"""The store of features: the same numbers as anew, once, whatever stops it and whoever helps."""

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lvssl.evaluation import embedding
from lvssl.evaluation.embedding import embed, embedded, help_to_embed
from lvssl.evaluation.nearest import knn
from lvssl.runs import features
from lvssl.runs.features import Store
from lvssl.runs.labels import Subset
from lvssl.runs.run import load_run
from lvssl.settings.stages import KnnSettings
from pipelines.decode import open_reader
from pipelines.errors import InputError

ARRAYS = ("features", "codes", "uncertainty", "labels", "rows", "bit_means", "rate_bits", "bits")


@pytest.fixture
def loaded(run, tmp_path):
    """The run, with a folder of its own for features."""
    found = load_run(run)
    object.__setattr__(found, "folder", tmp_path)
    return found


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


def test_stored_features_are_those_computed_anew_and_are_computed_once(loaded, digits, monkeypatch):
    monkeypatch.setattr(features, "PART", 512)
    source, view = open_reader(digits["train"]), loaded.settings.view
    found = embedded(loaded, source, workers=1)
    assert same(found, embed(loaded.network, source, view, workers=1))
    monkeypatch.setattr(embedding, "encode", None)
    assert same(embedded(loaded, source), found)
    (folder,) = (loaded.folder / "features").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "store.json", "features.npy", "codes.npy", "uncertainty.npy", "kl.npy", "bit_means.npy", "rows.npy",
    }  # fmt: skip
    assert np.array_equal(np.load(folder / "features.npy", mmap_mode="r"), found.features)


def test_another_checkpoint_set_view_or_arithmetic_is_another_store(loaded, digits):
    train, test = (open_reader(digits[split]) for split in ("train", "test"))
    keys = [embedding.store_of(loaded, source, 1, "raise", "")[0].key for source in (train, test)]
    object.__setattr__(loaded, "digest", "another")
    keys.append(embedding.store_of(loaded, train, 1, "raise", "")[0].key)
    assert len({str(key) for key in keys}) == 3 and len(list((loaded.folder / "features").iterdir())) == 3
    assert keys[0].keys() >= {"checkpoint", "set", "view", "arithmetic"}


class Numbers:
    """Stands for a network: ten numbers of each position, but of those in `missing`."""

    def __init__(self, missing=()):
        self.missing, self.computed = list(missing), []

    def __call__(self, rows):
        self.computed.append(int(rows[0]))
        for start in range(0, len(rows), 256):
            at = np.setdiff1d(rows[start : start + 256], self.missing)
            if len(at):
                yield at, {"x": at[:, None] * np.arange(10, dtype=np.float32), "y": at.astype(np.uint8)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_left_out_leave_no_gap(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART", 512)
    missing = [*range(512, 1024), 3, 1999]  # a whole part, and two more
    store = Store(tmp_path, {"a": 1}, 2000)
    store.fill(Numbers(missing))
    arrays, rows = store.open(), np.setdiff1d(np.arange(2000), missing)
    assert np.array_equal(arrays["rows"], rows) and np.array_equal(arrays["y"], rows.astype(np.uint8))
    assert np.array_equal(arrays["x"], rows[:, None] * np.arange(10, dtype=np.float32))


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from lvssl.runs import features
features.PART = 512
{numbers}
class Slow(Numbers):
    def __call__(self, rows):
        yield from super().__call__(rows)
        if len(self.computed) > 2:
            print("third", flush=True)
            time.sleep(60)
features.Store(Path(sys.argv[1]), {{"a": 1}}, 3000).fill(Slow([5]))
"""


def test_a_store_that_was_killed_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART", 512)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    Store(tmp_path / "whole", {"a": 1}, 3000).fill(Numbers([5]))
    script = KILLED.format(numbers=inspect.getsource(Numbers))
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout.readline() == b"third\n"
        helper = Numbers([5])  # while the other lives, its part is left to it
        Store(tmp_path / "killed", {"a": 1}, 3000).fill(helper, to_the_end=False)
        assert helper.computed == [1536, 2048, 2560]
        process.send_signal(signal.SIGKILL)
    store, rest = Store(tmp_path / "killed", {"a": 1}, 3000), Numbers([5])
    assert not store.whole
    store.fill(rest)
    assert rest.computed == [1024]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_no_write_sends_another_machines_bytes_along(tmp_path):
    """An NFS client extends a write to the whole page, of 4 to 64 KB, unless its file has O_DSYNC; another
    machine may be writing to the same page."""
    opened: list[tuple[object, int]] = []
    listening = [True]  # a hook can't be removed
    sys.addaudithook(lambda name, told: opened.append(told[::2]) if listening and name == "open" else None)
    Store(tmp_path, {}, 100).fill(Numbers())
    listening.clear()
    flags = [flags for path, flags in opened if str(path) == str(tmp_path / "x.npy")]
    to_write = [each for each in flags if each & (os.O_WRONLY | os.O_RDWR)]
    assert to_write and all(each & os.O_DSYNC for each in to_write)


def stopped(_: float) -> None:
    raise TimeoutError


def test_one_waits_for_what_another_process_computes(tmp_path, monkeypatch, capsys):
    first, second, numbers = Store(tmp_path, {}, 100), Store(tmp_path, {}, 100), Numbers()
    with first._lock("0") as mine:
        assert mine
        with monkeypatch.context() as patch, pytest.raises(TimeoutError):
            patch.setattr(features.time, "sleep", stopped)
            second.fill(numbers)
    assert "another process is computing" in capsys.readouterr().err and not numbers.computed
    second.fill(numbers)
    assert second.whole


def test_a_run_that_cannot_be_written_keeps_no_features_and_says_so(loaded, digits, capsys):
    (loaded.folder / "features").write_text("in the way")
    source = open_reader(digits["test"])
    found = embedded(loaded, source, workers=1)
    assert same(found, embed(loaded.network, source, loaded.settings.view, workers=1))
    said = capsys.readouterr().err
    assert said.startswith(f"note: {loaded.folder / 'features'} can't be written") and said.count("\n") == 1


def test_a_full_disk_and_a_damaged_store_are_named(tmp_path, monkeypatch):
    usage = features.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(InputError, match=r"not enough space: \d+(\.\d+)? kB are needed, 100 B are free"):
            Store(tmp_path, {}, 100).fill(Numbers())
    store = Store(tmp_path, {}, 100)
    store.fill(Numbers())
    for damaged in ((tmp_path / "x.npy").read_bytes()[:-1], b""):
        (tmp_path / "x.npy").write_bytes(damaged)
        with pytest.raises(InputError, match="damaged .* remove this folder"):
            store.open()


def test_a_damaged_image_stops_who_does_not_skip_it_though_the_store_is_there(loaded, digits, tmp_path):
    good = open_reader(digits["test"])
    source = Subset(good, np.arange(100))
    whole, crops = embedded(loaded, source, workers=1), source.crops

    def damaged(indices, boxes, out, flips=None):
        if 7 in indices:
            from pipelines.decode import DamagedSample

            raise DamagedSample(int(np.flatnonzero(indices == 7)[0]), 7, "sample 7 can't be decoded")
        crops(indices, boxes, out, flips)

    monkey = Subset(good, np.arange(100))
    monkey.crops = damaged
    object.__setattr__(loaded, "folder", tmp_path / "other")
    found = embedded(loaded, monkey, workers=1, on_error="skip")
    assert np.array_equal(found.rows, np.delete(whole.rows, 7))
    assert np.array_equal(found.labels, np.delete(whole.labels, 7)) and len(found.features) == 99
    with pytest.raises(InputError, match="sample 7 can't be decoded"):
        embedded(loaded, monkey, workers=1)
    monkey.crops = crops  # repaired
    for on_error in ("raise", "skip"):
        assert same(embedded(loaded, monkey, workers=1, on_error=on_error), whole)


def test_a_rank_but_the_first_helps_and_leaves(loaded, digits):
    source = open_reader(digits["test"])
    help_to_embed(loaded, source, workers=1)
    (folder,) = (loaded.folder / "features").iterdir()
    assert (folder / "store.json").is_file()


def test_commands_share_what_one_has_computed(run, digits, monkeypatch):
    first = knn(KnnSettings(run, k=3, workers=1, out=run / "a.json")).done
    monkeypatch.setattr(embedding, "encode", None)
    second = knn(KnnSettings(run, k=3, workers=1, out=run / "b.json")).done
    assert first["results"] == second["results"]
