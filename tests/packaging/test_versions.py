"""The versions that pyproject.toml asks for: `make test-oldest` runs the lowest of each."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.lower_bounds import lower_bounds

ROOT = Path(__file__).resolve().parents[2]


def test_each_lower_bound_of_pyproject_is_a_constraint():
    """Read from the text here, by the TOML's own rules there: a bound that either misses shows."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.findall(r'"([A-Za-z][\w-]*)>=([\w.]+)[^"]*"', text.split("[project.scripts]")[0])
    written = set(found)
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "lower_bounds.py"], capture_output=True, text=True, check=True
    )
    lines = [line.partition(";")[0].strip() for line in done.stdout.splitlines()]
    assert {tuple(line.split("==")) for line in lines} == written
    assert len(lines) == len(written)  # none twice
    assert {"torch", "numpy", "timm", "onnx", "pytest", "faiss-cpu"} <= {name for name, _ in written}


def project(*dependencies: str, **extras: list[str]) -> dict:
    return {"name": "mine", "dependencies": list(dependencies), "optional-dependencies": extras}


def test_a_marker_goes_along_and_a_package_named_twice_stands_once():
    asked = project('a>=1.5,<2; python_version < "3.11"', "b>=2", more=["b>=2,<3", "mine[other]"])
    assert lower_bounds(asked) == ['a==1.5; python_version < "3.11"', "b==2"]


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (project("a<2"), "a<2 has no lower bound"),
        (project("a>=1", more=["a>=2"]), "a has two lower bounds"),
    ],
)
def test_a_requirement_without_one_lower_bound_is_refused(asked, fault):
    with pytest.raises(ValueError, match=fault):
        lower_bounds(asked)
