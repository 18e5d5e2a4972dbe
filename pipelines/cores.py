"""How many of the machine's cores this process may use."""

import os


def cores() -> int:
    """The cores that the scheduler gives this process; all of them where the system can't say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
