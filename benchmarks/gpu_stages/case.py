"""A stage consists of named cases, which a process works through; any of them may kill the process.

    python -m benchmarks.gpu_stages.case SETUP     started by run.py; SETUP is a `Setup` as JSON

Every event is a line of JSON in the file `rows`: a case begins, returns rows, is done. The parent therefore
knows which case was running when a process hangs or dies, keeps its measurements so far, and starts another
process that continues after that case.
"""

import dataclasses
import gc
import importlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PATIENCE = 5.0  # factor by which a case may take longer in a dry run: on a CPU, perhaps with other work
BROKEN = 3  # exit status: the device's context is lost, but another process may continue


@dataclass(frozen=True)
class Setup:
    """The input of a stage's process."""

    stage: str
    module: str  # the module with `cases(setup)`
    rows: str  # path of a file
    device: str = "cuda"
    dry: bool = False  # tiny sizes
    seed: int = 0
    report: str = ""  # JSON file with the rows of the earlier stages
    scratch: str = ""  # folder shared by the stages
    images: str = ""  # a beton or folder for the steps at 224 px
    part: tuple[int, int] = (0, 1)  # K, N: every N-th case, starting with the K-th
    done: tuple[str, ...] = ()  # cases that must not be started again
    wanted: tuple[str, ...] = ()  # cases with one of these in their names; empty: all
    options: dict[str, Any] = field(default_factory=dict)  # of a single stage

    def earlier(self) -> list[Row]:
        """Rows of the earlier stages."""
        path = Path(self.report)
        return json.loads(path.read_text())["rows"] if self.report and path.exists() else []


@dataclass(frozen=True)
class Case:
    """One thing to find out. `make` returns a row, or yields several.

    In a row, "ok" says whether the result is right (True, False; None: not measured, or nothing to check),
    and "failed" why there are no figures.
    """

    name: str
    make: Callable[[], Row | Iterable[Row]]
    seconds: float = 60.0  # after which the process is killed, and another continues with the next case


def work(setup: Setup, cases: Callable[[Setup], Iterable[Case]], say: Callable[[Row], None]) -> int:
    """Work through this process's part of the cases; returns the exit status."""
    for number, case in enumerate(cases(setup)):
        if number % setup.part[1] != setup.part[0] or case.name in setup.done:
            continue
        if setup.wanted and not any(text in case.name for text in setup.wanted):
            continue
        patience = PATIENCE if setup.dry else 1.0
        say({"begin": case.name, "seconds": patience * case.seconds})
        for row in figures(case):
            say({"row": {"name": case.name, **{key: in_json(value) for key, value in row.items()}}})
        say({"done": case.name})
        if setup.device == "cuda" and not sound():
            return BROKEN
    return 0


def figures(case: Case) -> Iterator[Row]:
    """The rows of a case; a failure becomes a row with the last line of the exception."""
    try:
        made = case.make()
        yield from [made] if isinstance(made, dict) else made
    except ImportError as error:
        yield {"ok": None, "failed": f"missing: {error.name or error}"}
    except Exception as error:
        traceback.print_exc()
        yield {"ok": False, "failed": last_line(error)}


def in_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: replace them by words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def sound() -> bool:
    """Whether the device still works: after an illegal access every later call fails. Frees its memory."""
    import torch

    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main(argument: str) -> int:
    values = json.loads(argument)
    values |= {name: tuple(values[name]) for name in ("part", "done", "wanted")}
    setup = Setup(**values)
    with open(setup.rows, "a") as file:

        def say(line: Row) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        return work(setup, importlib.import_module(setup.module).cases, say)


def as_argument(setup: Setup) -> str:
    return json.dumps(dataclasses.asdict(setup))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
