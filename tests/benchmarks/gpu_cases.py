"""Cases that fail in every way; the stage of test_gpu_scripts.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_stages.case import Case, Row, Setup


def cases(setup: Setup) -> Iterator[Case]:
    yield Case("good", lambda: {"ok": True, "value": 1.5, "error": float("nan")})
    if setup.options.get("endless"):
        yield Case("endless", endless, seconds=1000)
        return
    yield Case("raises", fail)
    yield Case("lacks a package", lack)
    yield Case("several rows, then dead", partly)
    yield Case("hangs", lambda: hang(setup), seconds=0.5)
    yield Case("good again", lambda: {"ok": True})


def fail() -> Row:
    raise RuntimeError("first line\nCUDA error: an illegal memory access")


def lack() -> Row:
    import no_such_package  # type: ignore[import-not-found]

    return {"ok": no_such_package is None}


def partly() -> Iterator[Row]:
    yield {"name": "before the end", "ok": True}
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(setup: Setup) -> Row:
    """Hang together with a child process, which must not outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(setup.scratch, "child").write_text(str(child.pid))
    time.sleep(600)
    return {}


def endless() -> Iterator[Row]:
    number = 0
    while True:
        yield {"name": f"row {number}", "ok": True}
        number += 1
        time.sleep(0.05)
