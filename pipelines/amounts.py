"""Format bytes and seconds for people."""


def size_text(count: float) -> str:
    """ "999 B", "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # rounds to three digits
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def time_text(seconds: float) -> str:
    """ "45 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
