"""Copies on a node's own disk: whole or not used, made once, and never seen in what a run stores."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines import staging
from pipelines.amounts import size_text
from pipelines.decode import open_reader
from pipelines.staging import STAGED, near, stage


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Path:
    """A node's own disk, named by a variable; copies of 1,000 bytes at a time."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    monkeypatch.delenv(STAGED, raising=False)
    monkeypatch.setattr(staging, "BLOCK", 1000)
    yield tmp_path / "disk"
    os.environ.pop(STAGED, None)


def test_a_file_of_two_sets_is_copied_once(disk, tmp_path, capsys):
    (tmp_path / "a.beton").write_bytes(bytes(20_000_000))
    stage("$NODE_DISK", [tmp_path / "a.beton", tmp_path / "a.beton"])
    assert "staged 0.02 GB in " in capsys.readouterr().out


@pytest.fixture(params=[0, 1, 1000, 10_500])
def shared(request, tmp_path) -> Path:
    path = tmp_path / "set.beton"
    path.write_bytes(np.random.default_rng(0).bytes(request.param))
    return path


def test_a_copy_is_read_until_the_shared_file_changes(disk, shared, capsys):
    assert near(shared) == shared
    stage("$NODE_DISK", [shared])
    copy = near(shared)
    assert copy != shared and disk in copy.parents and copy.read_bytes() == shared.read_bytes()
    assert sorted(path.name for path in copy.parent.iterdir()) == sorted(["lock", copy.name])
    assert capsys.readouterr().err == ""
    shared.write_bytes(b"another" + shared.read_bytes())
    assert near(shared) == shared
    stage("$NODE_DISK", [shared])
    assert near(shared) not in (copy, shared) and near(shared).read_bytes() == shared.read_bytes()
    status, other = shared.stat(), bytes(shared.stat().st_size)
    shared.write_bytes(other)  # as long as before
    os.utime(shared, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert near(shared) == shared
    stage("$NODE_DISK", [shared])
    assert near(shared) != shared and near(shared).read_bytes() == other
    with open(near(shared), "ab") as copy:  # another length is another file's
        copy.write(b"more")
    assert near(shared) == shared


@pytest.mark.parametrize("shared", [10_500], indirect=True)
def test_a_file_that_changes_while_it_is_copied_is_not_staged(disk, shared, monkeypatch, capsys):
    pieces = staging._pieces

    def changing(file, size):
        for number, block in enumerate(pieces(file, size)):
            if file.name == str(shared) and number == 4:
                with open(shared, "r+b") as same:  # the part that was read already
                    same.write(b"\0" * 1000)
                os.utime(shared, ns=(0, 0))
            yield block

    monkeypatch.setattr(staging, "_pieces", changing)
    stage("$NODE_DISK", [shared])
    assert near(shared) == shared and "was changed meanwhile" in capsys.readouterr().err
    assert [path.name for path in disk.rglob("*") if path.is_file()] == ["lock"]


@pytest.mark.parametrize("shared", [10_500], indirect=True)
@pytest.mark.parametrize("harm", ["nothing", "lost", "garbled", "no notes"])
def test_a_half_copy_is_gone_on_with_and_never_read(disk, shared, harm, monkeypatch, capsys):
    """As after a kill in mid-copy; then, too, if the node has lost some of it."""
    pieces, read = staging._pieces, []

    def killed(file, size, most=4):
        for block in pieces(file, size):
            if file.name == str(shared):
                read.append(len(block))
                if len(read) > most:
                    raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(staging, "_pieces", killed)
    with pytest.raises(KeyboardInterrupt):
        stage("$NODE_DISK", [shared])
    (half,) = disk.rglob("*.half")
    assert half.stat().st_size == 4000 and near(shared) == shared
    if harm == "lost":
        os.truncate(half, 2500)
    if harm == "garbled":
        half.write_bytes(b"\0" * 4000)
    if harm == "no notes":
        next(disk.rglob("*.digests")).unlink()
    read.clear()
    monkeypatch.setattr(staging, "_pieces", lambda file, size: killed(file, size, most=99))
    stage("$NODE_DISK", [shared])
    assert sum(read) == 10_500 - {"nothing": 4000, "lost": 2000, "garbled": 4000, "no notes": 0}[harm]
    if harm == "garbled":  # not known before all is there
        assert near(shared) == shared and "differs from its copy" in capsys.readouterr().err
        assert not list(disk.rglob("*.half"))
        stage("$NODE_DISK", [shared])
    assert near(shared) != shared and near(shared).read_bytes() == shared.read_bytes()


@pytest.mark.parametrize("shared", [10_500], indirect=True)
def test_no_room_or_no_folder_is_one_line_and_the_shared_file_is_read(disk, shared, monkeypatch, capsys):
    def says(what: str, to: str = "$NODE_DISK") -> None:
        stage(to, [shared])
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and what in said[0] and str(shared) in said[0] and near(shared) == shared

    says("no such folder", "$NO_SUCH_VARIABLE")
    says("no such folder", str(disk / "none"))
    usage = shutil.disk_usage(disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_499))
    says(f"{size_text(shared.stat().st_size)} are needed and 10.5 kB are free")
    monkeypatch.undo()
    monkeypatch.setenv("NODE_DISK", str(disk))
    with monkeypatch.context() as full:
        full.setattr(staging, "_copy", lambda *_: os.pwrite(os.open("/dev/full", os.O_WRONLY), b"1", 0))
        says(os.strerror(errno.ENOSPC))
    monkeypatch.setenv("LOCAL_RANK", "1")
    stage("$NO_SUCH_VARIABLE", [shared])
    assert capsys.readouterr().err == ""  # a node's first process has said it


LOOK = """
import sys
from pathlib import Path
from pipelines.decode import open_reader
reader = open_reader(sys.argv[1])
opened = {str(each.resolve()) for each in Path("/proc/self/fd").iterdir()}
print(reader.file.path, sorted(name for name in opened if ".beton" in name))
"""


def test_of_a_nodes_processes_one_copies_and_all_read_the_copies(disk, beton, tmp_path):
    for name in ("set-0", "set-1"):
        for end in (".beton", ".beton.json"):
            shutil.copy(beton.with_suffix(end), tmp_path / f"{name}{end}")
    pattern = str(tmp_path / "set-*.beton")
    command = [sys.executable, "-m", "pipelines.staging", "$NODE_DISK", pattern, "--"]
    ranks = [
        subprocess.Popen(
            [*command, sys.executable, "-c", LOOK, pattern],
            env=os.environ | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 3
    assert sum("staged " in text for text in said) == 1
    looked = {text.splitlines()[-1] for text in said}
    assert len(looked) == 1 and looked.pop().startswith(f"{pattern} ['{disk}/")
    assert len(list(disk.rglob("*.beton"))) == 2
    before = open_reader(pattern)
    stage("$NODE_DISK", [])
    after = open_reader(pattern)
    assert after.encoded(0, 60) == before.encoded(0, 60)
    done = subprocess.run([*command[:4], "--"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("usage:")
