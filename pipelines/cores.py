"""How many of the machine's cores this process may use."""

import os


def cores() -> int:
    """The cores that the scheduler gives this process; all of them where the system can't say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_threads(asked: int = 0) -> int:
    """Threads that decode and augment: as asked, or (0) this process's share of the cores less two, 2 to 12.

    torchrun's processes share a machine's cores and say how many they are; Slurm gives each its own. Two are
    left for the training loop and what copies to the GPU.
    """
    return asked or max(2, min(12, cores() // max(1, processes("LOCAL_WORLD_SIZE")) - 2))


def processes(*variables: str) -> int:
    """The number in the first of these variables of the environment that holds one; 1 without."""
    texts = (os.environ.get(name, "") for name in variables)
    return next((int(text) for text in texts if text.isdecimal()), 1)
