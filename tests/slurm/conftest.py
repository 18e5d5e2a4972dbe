"""A real Slurm for the tests marked `slurm`, and how they use it."""

import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
from chains import Chain

from slurm.records import read_jobs


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skip if no cluster answers; `make test-slurm` starts one."""
    answer = ""
    if shutil.which("sinfo"):
        answer = subprocess.run(
            ["sinfo", "-h", "-o", "%n"], capture_output=True, text=True, timeout=30
        ).stdout
    if not answer.strip():
        pytest.skip("no Slurm answers here; `make test-slurm` starts one on this machine")


@pytest.fixture
def chain(tmp_path) -> Iterator[Callable[..., Chain]]:
    """Make a pipeline in its own folder, chain(TEXT), and cancel its remaining jobs afterwards."""
    made = []

    def make(text: str, name: str = "chain") -> Chain:
        (tmp_path / name).mkdir()
        (tmp_path / name / "pipeline.toml").write_text(text)
        made.append(Chain(tmp_path / name / "pipeline.toml"))
        return made[-1]

    yield make
    for each in made:
        jobs = {job["job"].split("_")[0] for job in read_jobs(each.out).values() if job["cluster"] == "slurm"}
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
