"""Stopping by a signal: it sets a flag that is read between steps, so that the state is saved first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


@dataclass
class Stop:
    """The signal that was received, if any; read between steps."""

    signal: int = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Context in which SIGTERM and SIGUSR2 (a cluster's warning) ask for a checkpoint and a stop."""
    stop = Stop()

    def ask(number: int, _: Any) -> None:
        stop.signal = number

    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            previous[number] = signal.signal(number, ask)
    except ValueError:  # not in the main thread, where no signal arrives
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
