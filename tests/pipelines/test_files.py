"""Files that are written beside: by two at once, by one that is killed; and JSON that every reader takes."""

import json
import math
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.amounts import size_text
from pipelines.files import json_text, write_atomically, write_json, written_aside

KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines.files import written_aside
with written_aside(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_two_that_write_the_same_file_at_once_do_not_meet(tmp_path):
    path = tmp_path / "result.json"
    with written_aside(path) as slow:
        slow.write(b"the first half, ")
        slow.flush()
        faster = threading.Thread(target=write_atomically, args=(path, b"all of the other"))
        faster.start()
        faster.join()
        assert path.read_bytes() == b"all of the other"
        slow.write(b"and the second")
        slow.flush()
        assert path.read_bytes() == b"all of the other"
    assert path.read_bytes() == b"the first half, and the second"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_is_too(tmp_path, monkeypatch):
    """Otherwise a power failure could leave an empty file under the final name."""
    path, said = tmp_path / "result.json", []
    fsync, rename = os.fsync, os.replace

    def synced(number: int) -> None:
        said.append((os.readlink(f"/proc/self/fd/{number}"), os.fstat(number).st_size, path.exists()))
        fsync(number)

    def renamed(old, new) -> None:
        said.append((str(old), str(new)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(path, b"whole ", b"file")
    aside = said[0][0]
    assert said[:2] == [(aside, 10, False), (aside, str(path))]
    assert [(name, there) for name, _, there in said[2:]] == [(str(tmp_path), True)]


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    """Root could: nothing would be printed any more on a machine whose /dev/stdout is a file."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/stdout"), Path("/dev/null")):
        with pytest.raises(OSError, match="is not a regular file"):
            write_atomically(path, b"text")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_what_a_kill_left_is_removed_by_the_next_process_and_what_is_being_written_is_not(tmp_path):
    path = tmp_path / "result.json"
    killed = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert killed.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    next_one = "import sys, pathlib, pipelines.files as f; f.write_json(pathlib.Path(sys.argv[1]), 1)"
    with written_aside(tmp_path / "other.json"):
        subprocess.run([sys.executable, "-c", next_one, path], check=True)
        left = sorted(p.name for p in tmp_path.iterdir())
        assert len(left) == 2 and left[0].startswith(".other.json.") and left[1] == "result.json"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "result.json"]


def test_another_machines_leftovers_stay_for_a_day(tmp_path):
    with subprocess.Popen(["true"]) as ended:  # a number that no process has here; another machine's may live
        pass
    for name, age in (("fresh", 60), ("old", 2 * 24 * 3600)):
        left = tmp_path / f".{name}.0000-{ended.pid}-0.partial"
        left.write_bytes(b"")
        os.utime(left, (left.stat().st_atime, left.stat().st_mtime - age))
    write_json(tmp_path / "result.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".fresh.0000-{ended.pid}-0.partial", "result.json"]


def test_json_has_null_for_what_is_no_number(tmp_path):
    content = {"a": [1, 0.5, math.nan, (math.inf, {"b": -math.inf})], "c": None, "d": True}
    assert json.loads(json_text(content)) == {"a": [1, 0.5, None, [None, {"b": None}]], "c": None, "d": True}
    write_json(tmp_path / "a.json", content)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)["c"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_numpy_number_is_no_exception(value):
    numpy = pytest.importorskip("numpy")
    assert json_text({"x": numpy.float64(value), "y": numpy.float64(1.5)}) == '{"x": null, "y": 1.5}'


def test_a_size_that_rounds_to_the_next_unit_is_in_that_unit():
    assert [size_text(size) for size in (0, 999, 999_499, 999_500, 999_950_000)] == [
        *("0 B", "999 B", "999 kB", "1 MB", "1 GB"),
    ]


def test_an_error_names_the_file_and_not_the_one_beside_it(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "nowhere" / "file"):
        with pytest.raises(OSError) as refused:
            write_atomically(path, b"new")
        assert (refused.value.filename, refused.value.filename2) == (str(path), None)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
