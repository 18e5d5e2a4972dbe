"""Run a command so that the system's errors, a closed or full stdout among them, are one line at most."""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import TypeVar

from pipelines.errors import in_words

CLOSED = 141  # exit status of a command whose reader has gone, as of one that SIGPIPE ends
Arguments = TypeVar("Arguments")


def run(command: Callable[[Arguments], int | None], arguments: Arguments) -> int:
    """Run a command and write what it has printed, so that a failure to do so is the command's.

    Returns the exit status: the command's, None counts as 0; CLOSED if the reader of stdout, such as `head`,
    has closed it; after one line on stderr, 2 if a file's permissions refuse, 1 for another OSError (disk
    full). Any other exception of the command is raised.
    """
    _prepare()
    try:
        try:
            status = command(arguments) or 0
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except OSError as error:
        closed = isinstance(error, BrokenPipeError) and _reader_has_gone()
        _drop_what_cannot_be_written()
        if closed:
            return CLOSED
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 2 if isinstance(error, PermissionError) else 1  # repeating it wouldn't help
    return status


def _prepare() -> None:
    """Make stdout and stderr take any text: file names that aren't text are escaped, and what is printed
    where they are closed (`>&-`) is dropped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _reader_has_gone() -> bool:
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # not a file, as in a notebook
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_what_cannot_be_written() -> None:
    """Python would try again when it exits, and fail with a message and a status of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
