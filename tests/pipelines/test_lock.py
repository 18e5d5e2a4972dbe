"""A lock that another process holds is refused; a file system without locks is worked on all the same."""

import errno
import fcntl
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from lvssl.codes.writer import CodeWriter
from lvssl.runs.run import run_lock
from pipelines.convert.journal import Journal
from pipelines.lock import lock
from slurm.records import claimed

HOLD = """
import sys, pathlib
from pipelines.lock import lock
file = open(sys.argv[1], "ab")
lock(file, pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def held(path: Path) -> None:
    with open(path, "ab") as file:
        lock(file, path)


def test_taken_is_refused_and_free_again_after_a_kill(tmp_path):
    path = tmp_path / "lock"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError):
        held(path)
    other.kill()
    other.communicate()
    held(path)


def journal(folder: Path):
    made = Journal(folder / "journal", "this conversion")
    made.close()
    return nullcontext()


def writer(folder: Path):
    return CodeWriter(folder / "a.lvcodes", family="none", bits=8, checkpoint="c", created_by="test")


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK], ids=errno.errorcode.get)
@pytest.mark.parametrize("guarded", [run_lock, claimed, journal, writer])
def test_a_file_system_without_locks_is_worked_on_with_a_notice(tmp_path, monkeypatch, capsys, guarded, code):
    def no_locks(*_):
        raise OSError(code, "not supported here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with guarded(tmp_path):
        pass
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"warning: {tmp_path}") and "no locks" in said[0]
