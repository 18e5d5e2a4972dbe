"""What the tests of Triton kernels share: scripts in processes of their own, and what a kernel takes up.

The interpreter is chosen by a variable that must be set before Triton is imported, hence the processes.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Shared memory a block may have: A100 (sm_80) 163 KiB, H100 (sm_90) 227 KiB.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


def run(script: str, *arguments: str, **environment: str) -> list[str]:
    """The lines that a script of tests/ prints."""
    paths = os.pathsep.join(map(str, (HERE.parent, HERE)))
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return done.stdout.splitlines()


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of its stack (where spilled registers go), by Triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said.stdout))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def assert_fits(rows: list[dict]) -> None:
    """No spills, and no more shared memory than a block may have."""
    assert rows
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[row["sm"]], row
