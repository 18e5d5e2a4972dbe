"""Code files as they are written: kills and interrupts, the means beside them, and the bytes themselves."""

import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from lvssl.codes import writer as codes_writer
from lvssl.codes.file import MEANS, ROWS_AT, CodeFileError, header_block, open_codes, open_means
from lvssl.codes.search import hamming_search, rerank
from lvssl.codes.writer import CodeWriter
from pipelines.kernels.pack import pack_bits

BITS, DIM, N = 13, 5, 40


def content(n=N):
    generator = np.random.default_rng(0)
    return (
        pack_bits(generator.random((n, BITS)) < 0.5),
        [f"bild {i} \udcff" for i in range(n)],
        generator.normal(size=(n, DIM)).astype(np.float16),
    )


def writer(path, means=DIM, source="set 1", checkpoint="ab"):
    return CodeWriter(
        path,
        family="x",
        bits=BITS,
        checkpoint=checkpoint,
        created_by="test",
        beside={MEANS: means},
        source=source,
    )


def write(path, interrupt_after=None, **options):
    """Rows three at a time from where the writer stands; returns where it stood."""
    rows, names, means = content()
    with writer(path, **options) as open_writer:
        first = open_writer.position
        for i in range(first, N, 3):
            if interrupt_after is not None and i >= interrupt_after:
                raise KeyboardInterrupt
            part = slice(i, i + 3)
            open_writer.append(rows[part], names[part], means[part] if open_writer.tables else None)
    return first


def whole(folder):
    write(folder / "whole.lvcodes")
    return [(folder / f"whole.lvcodes{end}").read_bytes() for end in ("", ".means")]


def test_bytes_are_the_documented_ones(tmp_path):
    """Built by hand, little-endian throughout: what another machine writes and reads."""
    write(tmp_path / "a.lvcodes")
    rows, names, means = content()
    texts = [name.encode("utf-8", "surrogateescape") for name in names]
    header = {
        "version": 1, "family": "x", "bits": BITS, "count": N, "checkpoint": "ab", "created_by": "test",
        "names_bytes": sum(map(len, texts)), "rows_sha256": hashlib.sha256(rows.tobytes()).hexdigest(),
    }  # fmt: skip
    text = json.dumps(header, sort_keys=True).encode()
    ends = np.cumsum([0, *map(len, texts)])
    built = b"LVCODES\n" + struct.pack("<Q", len(text)) + text.ljust(ROWS_AT - 16) + rows.tobytes()
    built += b"\0" * (-len(built) % 8) + struct.pack(f"<{N + 1}Q", *ends) + b"".join(texts)
    assert (tmp_path / "a.lvcodes").read_bytes() == built
    (tmp_path / "b.lvcodes").write_bytes(built)
    again = open_codes(tmp_path / "b.lvcodes")
    assert list(again.names) == names and np.array_equal(again.rows, rows)
    halves = b"".join(struct.pack("<e", value) for value in means.ravel().tolist())
    assert (tmp_path / "a.lvcodes.means").read_bytes()[ROWS_AT:] == halves


@pytest.mark.parametrize("cut", ["", ".names", ".means"])
@pytest.mark.parametrize("lost", [0, 1, 17])
def test_an_interrupted_writer_goes_on_wherever_its_parts_end(tmp_path, cut, lost):
    codes, means = whole(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.lvcodes", interrupt_after=18)
    assert not (tmp_path / "a.lvcodes").exists()
    part = tmp_path / f".a.lvcodes{cut}.part"
    part.write_bytes(part.read_bytes()[: part.stat().st_size - lost])  # what a kill in mid-write leaves
    first = write(tmp_path / "a.lvcodes")
    assert first <= 18 and (first == 18 if lost == 0 else first < 18)
    assert (tmp_path / "a.lvcodes").read_bytes() == codes
    assert (tmp_path / "a.lvcodes.means").read_bytes() == means
    assert not list(tmp_path.glob(".*"))


def test_other_work_starts_anew(tmp_path):
    codes, _ = whole(tmp_path)
    for other in ({"source": "set 2"}, {"checkpoint": "cd"}, {"means": 0}):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "a.lvcodes", interrupt_after=9, **other)
        assert write(tmp_path / "a.lvcodes") == 0
        assert (tmp_path / "a.lvcodes").read_bytes() == codes


def test_skipped_positions_are_remembered(tmp_path):
    rows, names, means = content()
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "a.lvcodes") as half:
        half.append(rows[:2], names[:2], means[:2], positions=[0, 7])
        raise KeyboardInterrupt
    with writer(tmp_path / "a.lvcodes") as half:
        assert (half.position, half.count) == (8, 2)
        half.append(rows[2:3], names[2:3], means[2:3])
        assert half.position == 9


def test_errors_keep_what_was_written_and_nothing_where_nothing_was(tmp_path):
    rows, names, means = content()
    with pytest.raises(CodeFileError, match="a.lvcodes: .*disk full"), writer(tmp_path / "a.lvcodes"):
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(ValueError, match=r"3 names need means \[3, 5\]"),
        writer(tmp_path / "a.lvcodes") as half,
    ):
        half.append(rows[:3], names[:3], means[:3])
        half.append(rows[3:6], names[3:6], means[3:5])
    assert write(tmp_path / "a.lvcodes") == 3


def test_two_writers_of_one_file_are_refused(tmp_path):
    with writer(tmp_path / "a.lvcodes"):
        with (
            pytest.raises(CodeFileError, match="another process is writing it"),
            writer(tmp_path / "a.lvcodes"),
        ):
            pass
    assert open_codes(tmp_path / "a.lvcodes").count == 0


@pytest.mark.parametrize("moment", ["locking", "ending"])
def test_a_writer_that_comes_as_another_ends_harms_nothing(moment, tmp_path, monkeypatch):
    """It has opened the other's part before the other renames it, or makes its own right after that."""
    path, real = (
        tmp_path / "a.lvcodes",
        {name: getattr(codes_writer, name) for name in ("lock", "sync_folder")},
    )

    def late_lock(*arguments):
        monkeypatch.setattr(codes_writer, "lock", real["lock"])
        write(path)
        real["lock"](*arguments)

    def late_end(folder):
        monkeypatch.setattr(codes_writer, "sync_folder", real["sync_folder"])
        second.__enter__()

    second = writer(path, source="set 2")
    if moment == "locking":
        monkeypatch.setattr(codes_writer, "lock", late_lock)
        with pytest.raises(CodeFileError, match="another process is writing it"):
            second.__enter__()
        assert open_codes(path).count == N
        return
    monkeypatch.setattr(codes_writer, "sync_folder", late_end)
    write(path)
    assert open_codes(path).count == N
    second.append(content()[0][:2], ["a", "b"], content()[2][:2])
    second.__exit__(None, None, None)
    assert open_codes(path).count == 2 and open_means(open_codes(path)).shape == (2, DIM)


KILLED = """
import sys, time, numpy as np
sys.path.insert(0, {folder!r})
import test_writer as t
append = t.CodeWriter.append
def slow(self, *rest):
    append(self, *rest)
    time.sleep(0.02)
t.CodeWriter.append = slow
from pathlib import Path
t.write(Path({path!r}))
"""


def test_kill_9_leaves_nothing_under_the_name_and_the_next_one_ends_bit_equal(tmp_path):
    codes, means = whole(tmp_path)
    path = tmp_path / "a.lvcodes"
    program = KILLED.format(folder=os.path.dirname(__file__), path=str(path))
    part, sizes = tmp_path / ".a.lvcodes.part", []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", program])
        while not (part.exists() and part.stat().st_size > ROWS_AT + 12 * (1 + len(sizes))):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        sizes.append(part.stat().st_size)
        assert not path.exists()
    assert sizes[1] > sizes[0]
    assert write(path) > 0
    assert path.read_bytes() == codes and (tmp_path / "a.lvcodes.means").read_bytes() == means


# --- the means ------------------------------------------------------------------------------------


def test_means_belong_to_their_codes(tmp_path):
    write(tmp_path / "a.lvcodes")
    codes = open_codes(tmp_path / "a.lvcodes")
    found = open_means(codes)
    assert isinstance(found, np.memmap) and np.array_equal(found, content()[2])
    file = tmp_path / "a.lvcodes.means"
    good = file.read_bytes()
    fields = {"version": 1, "dim": DIM, "count": N, "rows_sha256": codes.rows_sha256}
    assert good[:ROWS_AT] == header_block(MEANS.magic, fields)
    for changed, message in [
        (good[:-1], f"truncated at byte {len(good) - 1}; 40 means of 5 dimensions"),
        (good[:100], "truncated at byte 100"),
        (good + b"x", "1 bytes follow"),
        (header_block(MEANS.magic, fields | {"rows_sha256": "00"}) + good[ROWS_AT:], "belong to other codes"),
        (header_block(MEANS.magic, fields | {"dim": 0}) + good[ROWS_AT:], "no valid dim"),
        (b"GIF89a..", "not a file of means"),
    ]:
        file.write_bytes(changed)
        with pytest.raises(CodeFileError, match=message):
            open_means(codes)
    file.unlink()
    with pytest.raises(CodeFileError, match="encode --means"):
        open_means(codes)


def test_no_rows_and_no_means(tmp_path):
    with writer(tmp_path / "a.lvcodes"):
        pass
    codes = open_codes(tmp_path / "a.lvcodes")
    assert codes.count == 0 and open_means(codes).shape == (0, DIM)


def test_reranking_is_the_order_by_cosine_and_of_expected_distance(tmp_path):
    generator = np.random.default_rng(0)
    logits = 2 * generator.normal(size=(60, 200))
    means = np.tanh(logits / 2)  # of bits +-1 with these logits
    codes = pack_bits(logits > 0)
    rows, _ = hamming_search(codes[:3], codes, 30)
    best, cosine = rerank(means[:3], means.astype(np.float16), rows, 30)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    truth = np.take_along_axis(unit[:3] @ unit.T, rows, axis=1)
    assert np.allclose(cosine, -np.sort(-truth, axis=1), atol=2e-3)
    assert np.array_equal(best[:, 0], [0, 1, 2]) and set(best[1]) == set(rows[1])
    drawn = [generator.random((4000, 200)) < 1 / (1 + np.exp(-logits[i])) for i in (0, 1)]
    expected = (200 - means[0] @ means[1]) / 2
    assert (drawn[0] != drawn[1]).sum(axis=1).mean() == pytest.approx(expected, abs=1)
    few, _ = rerank(means[:3], means, rows, 1)
    assert np.array_equal(few[:, 0], [0, 1, 2])


def test_reranking_refuses_what_does_not_match():
    means, rows = np.ones((4, 3)), np.zeros((2, 2), np.int64)
    for arguments, message in [
        ((np.ones((2, 5)), means, rows, 1), "means"),
        ((np.ones((1, 3)), means, rows, 1), "candidates"),
        ((np.ones((2, 3)), means, rows, 3), "between 1 and the 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            rerank(*arguments)
    best, cosine = rerank(np.zeros((2, 3)), means, rows, 2)  # a mean of zeros is like nothing, and no nan
    assert not cosine.any() and np.array_equal(best, rows)


@pytest.mark.parametrize("filled_at", [0, 1, 260, 500], ids=["open", "first", "middle", "finish"])
def test_a_full_disk_is_named_and_once_there_is_room_it_goes_on(tmp_path, small_disk, fill, filled_at):
    generator = np.random.default_rng(0)
    rows, names = generator.integers(0, 256, (500, 256), np.uint8), [f"image {i}" for i in range(500)]
    means = generator.normal(size=(500, 64)).astype(np.float16)

    def encode(path, full_at=None):
        how = {"family": "x", "bits": 2048, "checkpoint": "ab", "created_by": "test", "beside": {MEANS: 64}}
        if full_at == 0:
            fill()
        with CodeWriter(path, **how, source="set 1") as open_writer:
            first = open_writer.position
            for i in range(first, 500, 20):
                if full_at is not None and 0 < full_at <= i + 1:
                    fill()
                part = slice(i, i + 20)
                open_writer.append(rows[part], names[part], means[part])
            if full_at == 500:
                fill()
        return first

    path = small_disk / "x.lvcodes"
    with pytest.raises(CodeFileError) as raised:
        encode(path, filled_at)
    said = str(raised.value)
    assert said.startswith(f"{path}: no space left on the disk; ")
    found = re.search(r"; (\d+) codes are kept: free some space and run the command again$", said)
    kept = int(found.group(1)) if found else 0
    assert found or said.endswith("nothing was written")
    assert kept == (0 if filled_at < 20 else filled_at // 20 * 20)
    left = [p.name for p in small_disk.iterdir() if p.name != "ballast"]
    assert bool(left) == bool(kept) and path.name not in left
    (small_disk / "ballast").unlink()
    assert kept <= encode(path) < kept + 20  # the last page may have had room for some more
    encode(tmp_path / "whole.lvcodes")
    for end in ("", ".means"):
        assert path.with_name(path.name + end).read_bytes() == (tmp_path / f"whole.lvcodes{end}").read_bytes()
