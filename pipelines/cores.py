"""How many of the machine's cores this process may use."""

import os


def cores() -> int:
    """Number of cores that the scheduler gives this process; all cores if the system can't say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_threads(asked: int = 0) -> int:
    """Threads for decoding and augmenting: as asked, or (0) this process's share of the cores less two, 2 to
    12.

    torchrun's processes share a machine's cores and state how many they are; Slurm gives each process its
    own. Two cores are left for the training loop and for copies to the GPU.
    """
    return asked or max(2, min(12, cores() // max(1, processes("LOCAL_WORLD_SIZE")) - 2))


def processes(*variables: str) -> int:
    """The number in the first of these environment variables that holds one; 1 if none does."""
    texts = (os.environ.get(name, "") for name in variables)
    return next((int(text) for text in texts if text.isdecimal()), 1)
