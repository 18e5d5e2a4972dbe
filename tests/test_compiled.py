"""Compiled code where nothing can be kept: a shared installation, read-only, and a user without a home."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import numpy as np
from pipelines.order import permuted
from lvssl.codes.hamming import full_add, popcount, compiled
assert len(set(permuted(np.arange(100), 100, 1, 2).tolist())) == 100
assert compiled()(lambda x: popcount(x))(np.uint64(7)) == 3
"""


def test_all_that_is_compiled_loads_and_runs_where_nothing_can_be_kept(tmp_path):
    """In a copy in which each __pycache__ is a file: not even root can keep anything there."""
    for package in ("lvssl", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        (folder / "__pycache__").touch()
    files = [
        path for path in tmp_path.rglob("*.py") if re.search(r"^@(compiled|njit)\(", path.read_text(), re.M)
    ]
    modules = [".".join(path.relative_to(tmp_path).with_suffix("").parts) for path in files]
    assert {"pipelines.augment.cpu", "pipelines.convert.area", "lvssl.codes.hamming"} <= set(modules)
    nowhere = {
        "HOME": "/dev/null/home",
        "NUMBA_CACHE_DIR": "/dev/null/cache",
        "XDG_CACHE_HOME": "/dev/null/x",
    }
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(tmp_path)}
    lines = [f"import {module} as m; assert m.__file__.startswith({str(tmp_path)!r})" for module in modules]
    command = [sys.executable, "-c", "\n".join(lines) + CHECK]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_kept_is_not_used_once_a_called_function_of_another_file_has_changed(tmp_path):
    """Called by its name, and as a part of its module."""
    head, script = "from pipelines.kernels.compiled import compiled\n", ""
    for name, used, call in (("a", "from inner import f", "f(x)"), ("b", "import inner", "inner.f(x)")):
        (tmp_path / f"{name}.py").write_text(f"{head}{used}\n@compiled()\ndef g(x):\n    return {call}\n")
        script += f"from {name} import g; print(g(3), sum(g.stats.cache_hits.values()))\n"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", script]
    said = []
    for inner in ("x + 1", "x + 1", "x + 2"):
        (tmp_path / "inner.py").write_text(f"{head}@compiled()\ndef f(x):\n    return {inner}\n")
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split())
    assert said == [2 * ["4", "0"], 2 * ["4", "1"], 2 * ["5", "0"]]
