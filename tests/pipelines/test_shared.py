"""Columns of a set that a node's processes share: one file, one copy in memory, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines import shared
from pipelines.decode.beton import BetonReader
from pipelines.formats.beton import RAW, BetonWriter

READS = """if True:
    import sys
    import numpy as np
    from pipelines.decode.beton import BetonReader
    reader = BetonReader(sys.argv[1])
    maps = open("/proc/self/maps").read()
    print(int(reader.labels.sum()), int(reader.heights.sum()), maps.count("lvssl-arrays-"), flush=True)
    sys.stdin.read()
"""
HOLDS = """if True:
    import numpy as np
    from pipelines.shared import shared
    def anonymous():
        return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
    before = anonymous()
    held = shared(lambda: "ones", lambda: {"ones": np.ones(8 << 20)})
    print(held["ones"].sum() / (8 << 20), anonymous() - before, flush=True)
    input()
"""


@pytest.fixture
def beton(tmp_path) -> Path:
    return written(tmp_path / "set.beton")


def written(path: Path, step: int = 1) -> Path:
    with open(path, "wb") as file:
        writer = BetonWriter(file, 30, ["age"])
        for n in range(30):
            writer.add(RAW, 1, 1 + n % 3, bytes(3 * (1 + n % 3)), step * n % 7, [n / 2])
        writer.finish()
    head = {"classes": [f"c{n}" for n in range(7)], "targets": ["age"], "count": 30, "samples": []}
    Path(f"{path}.json").write_text(json.dumps(head))
    return path


def started(script: str, *arguments: object, ranks: int = 2, temporary: Path) -> subprocess.Popen:
    environment = os.environ | {"LOCAL_WORLD_SIZE": str(ranks), "TMPDIR": str(temporary)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment, **pipes)


def in_folder(temporary: Path) -> list[Path]:
    return list(temporary.glob("lvssl-arrays-*/*"))


def test_ranks_map_one_file_which_the_last_of_them_removes(beton, tmp_path):
    ranks = [started(READS, beton, temporary=tmp_path) for _ in range(2)]
    alone = BetonReader(beton)
    for rank in ranks:
        labels, heights, maps = map(int, rank.stdout.readline().split())
        assert (labels, heights) == (alone.labels.sum(), alone.heights.sum()) and maps > 0
    assert len([path for path in in_folder(tmp_path) if path.is_dir()]) == 1
    for rank in ranks:
        rank.communicate()
    assert in_folder(tmp_path) == []


def test_a_process_alone_maps_nothing(beton, tmp_path):
    rank = started(READS, beton, ranks=1, temporary=tmp_path)
    assert rank.communicate()[0].split()[2] == "0" and in_folder(tmp_path) == []


def test_all_columns_are_as_they_are_without_other_processes(beton, tmp_path, monkeypatch):
    alone = BetonReader(beton)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setattr(shared.tempfile, "tempdir", str(tmp_path))
    mapped = BetonReader(beton)
    for name in ("modes", "heights", "widths", "labels", "offsets", "sizes"):
        own, theirs = getattr(alone.file, name), getattr(mapped.file, name)
        assert np.array_equal(own, theirs) and own.dtype == theirs.dtype, name
    assert mapped.classes == alone.classes and list(mapped.targets) == ["age"]
    assert np.array_equal(mapped.targets["age"], alone.targets["age"])
    assert np.array_equal(mapped.encoded(0, 4), alone.encoded(0, 4))


def test_each_set_has_its_own_arrays_and_anew_if_it_changes(beton, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(shared.tempfile, "tempdir", str(tmp_path))
    for name, step in ((beton.name, 1), ("other.beton", 2), (beton.name, 3)):
        path = written(tmp_path / name, step)
        os.utime(path, ns=(0, step))  # all are equally long
        labels = BetonReader(path).labels
        assert labels.tolist() == [step * n % 7 for n in range(30)]
        labels[0] = 5  # in a copy of this process's own
        assert BetonReader(path).labels[0] == 0


def test_memory_is_taken_once(tmp_path):
    first = started(HOLDS, temporary=tmp_path)
    assert first.stdout.readline().startswith("1.0 ")
    second = started(HOLDS, temporary=tmp_path)
    total, grown = map(float, second.stdout.readline().split())
    assert total == 1 and grown < 16, "of 64 MiB"
    for process in (first, second):
        process.communicate("\n")


def test_what_a_killed_process_leaves_goes_with_the_next(beton, tmp_path):
    rank = started(READS, beton, temporary=tmp_path)
    rank.stdout.readline()
    rank.send_signal(signal.SIGKILL)
    rank.communicate()
    assert in_folder(tmp_path)
    beton.with_name(beton.name + ".json").unlink()  # another set by now
    started(READS, beton, temporary=tmp_path).communicate()
    assert in_folder(tmp_path) == []


def test_where_no_file_can_be_made_each_has_its_own(beton, tmp_path):
    (tmp_path / f"lvssl-arrays-{os.getuid()}").write_text("in the way")
    rank = started(READS, beton, temporary=tmp_path)
    assert rank.communicate()[0].split() == ["85", "30", "0"]


def test_what_a_process_killed_while_it_wrote_leaves_goes_too(tmp_path):
    dies = "import os; from pipelines import shared; shared.np.save = lambda *_: os.kill(os.getpid(), 9); "
    rank = started(
        dies + "shared.shared(lambda: 'ones', lambda: {'ones': shared.np.ones(3)})", temporary=tmp_path
    )
    rank.communicate()
    assert [path for path in in_folder(tmp_path) if path.is_dir()]
    started(HOLDS, temporary=tmp_path).communicate("\n")
    assert in_folder(tmp_path) == []


def test_a_mark_that_was_removed_before_its_lock_is_made_again(tmp_path, monkeypatch):
    mark, locks = tmp_path / "set.used", []

    def flock(file, how):
        if not locks:
            mark.unlink()
        locks.append(how)

    monkeypatch.setattr(shared.fcntl, "flock", flock)
    with shared.in_use(mark) as used:
        assert len(locks) == 2 and shared.stands(used, mark)


def test_a_link_in_the_folders_place_is_not_followed(beton, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    for name in ("set.used", "set"):
        (tmp_path / "mine" / name).touch()
    link = tmp_path / f"lvssl-arrays-{os.getuid()}"
    link.symlink_to(tmp_path / "mine")
    real = Path.lstat

    class Others:
        st_uid = os.getuid() + 1  # who made the link: to make one as another user takes root

    monkeypatch.setattr(Path, "lstat", lambda path: Others() if path == link else real(path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(shared.tempfile, "tempdir", str(tmp_path))
    assert len(BetonReader(beton)) == 30
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["set", "set.used"]
