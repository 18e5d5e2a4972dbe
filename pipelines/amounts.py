"""Format numbers, bytes and seconds for people."""


def number_text(value: float, digits: int = 6) -> str:
    """Whole from 1,000 on, else to so many digits: 29,100 rather than 2.91e+04; 0.1235; 1.2e+20."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.{digits}g}"


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
