"""Every command of the command line, as it is typed for a run and two sets."""

from pathlib import Path
from typing import Any

import pytest

from lvssl.commands.main import main

SHORT = {"linear": ["--probe", "logistic"], "finetune": ["--epochs", 1, "--min-steps", 1, "--lr", 0.1]}
NO_RUN = ("launch", "status", "cancel", "retry")  # they take a pipeline, which has its own file


def arguments_of(name: str, run: Path, train: Path, test: Path, out: Path) -> list[str]:
    """Return the arguments of a command for this run and these sets. A command that is not named here, such
    as a new one, is called with the run alone."""
    sets, chain = ["--train", train, "--test", test], out / "pipeline.toml"
    special: dict[str, list[Any]] = {
        "pretrain": ["--out", run, "--resume", "--epochs", 1],
        "linear": [run, *sets, "--out", out / "linear.json"],
        "knn": [run, *sets, "--out", out / "knn.json"],
        "finetune": [run, *sets, "--out", out / "finetune"],
        "evaluate": [run, *sets, "--out", out / "evaluate"],
        "analyse": [run, "--test", test, "--samples", 2, "--out", out / "analyse"],
        "compression": [run, *sets, "--bits", 16, "--out", out / "compression"],
        "study": [
            *sets, "--runs", run.parent, "--prefix", run.name, "--arms", "bernoulli", "--seeds", 0,
            "--preset", "digits", "--epochs", 1, "--out", out / "study",
        ],
        "curate": [run, "--test", test, "--out", out / "curate"],
        "encode": [run, "--images", train, "--out", out / "codes.lvcodes"],
        "search": [run, "--query", test, "--codes", out / "codes.lvcodes"],
        "report": [run, "--out", out],
        "export": [run, "--no-onnx", "--out", out / "export"],
        "presets": [run],
        "plan": ["--preset", run],
        "demo": ["--data", run, "--out", out / "demo"],
        **{command: [chain] for command in NO_RUN},
        "retry": ["pretrain", chain],
    }  # fmt: skip
    return [name, *map(str, [*special.get(name, [run]), *SHORT.get(name, [])])]


def call(arguments: list[str], capsys) -> tuple[int, str]:
    """Return status and stderr of a command. It may fail, but not with an unexpected exception."""
    try:
        status = main(arguments)
    except SystemExit as stopped:  # from the parser
        status = stopped.code
    except Exception as error:
        said = f"{' '.join(arguments)}: {type(error).__name__}: {error}"
        pytest.fail(said.encode("ascii", "backslashreplace").decode())  # any reporter can write this
    return status, capsys.readouterr().err


def check(status: int, said: str, what: str, *names: str) -> None:
    """Assert success, or a single error line that names what is wrong."""
    assert status in (0, 1, 2), what
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said and len(errors) == (status != 0), f"{what}: {said}"
    if status:
        assert any(name in errors[0] for name in names), f"{what}: {errors[0]}"
