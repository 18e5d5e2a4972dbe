"""Let one process work at a time: a lock on an open file, which the system releases if the process dies."""

import fcntl
import sys
from pathlib import Path
from typing import IO


def lock(file: IO, path: Path) -> None:
    """Lock `file`, open for writing, until it is closed; `path` names what it guards in the warning.

    Some file systems have no locks, such as Lustre mounted without `flock` and some NFS. There the work
    continues without a lock, and a line on stderr says so.

    Raises:
        BlockingIOError: another process holds the lock. Nothing else is raised.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        said = f"its file system has no locks ({error.strerror}): do not run a second process on it"
        print(f"warning: {path}: {said}", file=sys.stderr, flush=True)
