"""What a user gets by pip and make: the packages in the wheel, the commands, the targets."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"lvssl", "pipelines", "tools", "slurm", "benchmarks"}
BIN = Path(sys.executable).parent


def test_the_wheel_holds_every_tracked_file_of_the_packages_and_nothing_else(tmp_path):
    """Built from the tracked files, for a checkout may hold a `build/` that setuptools would take along."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).exists():
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "src" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    done = subprocess.run([*command, tmp_path, tmp_path / "src"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("lvssl-*-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if name.split("/")[0] in PACKAGES}
    ours = {name for name in tracked if name.split("/")[0] in PACKAGES and (ROOT / name).exists()}
    assert inside == ours - {"tools/install.sh", "tools/slurm_cluster.sh"}
    assert {name.split("/")[0] for name in inside} == PACKAGES
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("command", ["lvssl", "convert-beton"])
def test_help_comes_quickly_and_with_status_0(command):
    done = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout


def test_lvssl_help_does_not_wait_for_torch():
    code = (
        "import contextlib, sys\n"
        "from lvssl.cli import main\n"
        "sys.argv = ['lvssl', '--help']\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert done.stderr.strip().endswith("False"), done.stderr


def test_an_unknown_command_is_refused_with_status_2():
    done = subprocess.run([BIN / "lvssl", "pretend"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def dry_run(target: str, **env: str) -> str:
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "target",
    ["demo", "test", "test-slow", "test-gpu", "test-oldest", "study", "bench", "lint", "format"],
)
def test_each_target_does_its_own_set_up_first(target):
    assert "tools/install.sh" in dry_run(target).splitlines()[0]


def test_what_the_targets_run():
    assert ".venv/bin/lvssl demo --out runs/demo" in dry_run("demo")
    assert 'pytest -q -m "not slow and not gpu and not slurm"' in dry_run("test")
    assert "tools/slurm_cluster.sh run .venv/bin/python -m pytest -q -m slurm" in dry_run("test-slurm")
    assert "mypy" in dry_run("lint") and "ruff format --check" in dry_run("lint")
    assert "EXTRAS='ffcv,dev,bench'" in dry_run("bench")
    assert "PYTHON='python3.12'" in dry_run("install", PYTHON="python3.12")
    assert ".venv" not in dry_run("clean").replace("-path './.venv*' -prune", "")


def test_plain_make_lists_every_target():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (phony,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:")]
    for target in phony.split()[1:]:
        assert f"make {target} " in listed


def test_an_interpreter_that_does_not_fit_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "install.sh").write_bytes((ROOT / "tools" / "install.sh").read_bytes())
    (tmp_path / "pyproject.toml").write_text("")
    done = subprocess.run(
        ["bash", "tools/install.sh"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": "python2.7"},
    )
    assert done.returncode == 1
    assert done.stderr == "error: PYTHON=python2.7 is no Python >= 3.10\n"
    assert not (tmp_path / ".venv").exists()


def test_without_root_or_sudo_the_command_is_shown(tmp_path):
    """A machine that lacks pkg-config and the libraries, and a user who is nobody there."""
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("bash", "dirname", "mkdir", "flock", "xargs", "sha256sum", "cut", "sed", "env", "echo"):
        (bare / tool).symlink_to(shutil.which(tool) or tool)
    (bare / "apt-get").write_text("#!/bin/sh\nexit 99\n")
    (bare / "id").write_text("#!/bin/sh\necho 1000\n")
    (bare / "python3").symlink_to(Path(sys.executable).resolve())
    for tool in ("apt-get", "id"):
        (bare / tool).chmod(0o755)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "install.sh").write_bytes((ROOT / "tools" / "install.sh").read_bytes())
    (tmp_path / "pyproject.toml").write_text("")
    done = subprocess.run(
        [bare / "bash", "tools/install.sh"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={"PATH": str(bare), "HOME": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "as root: apt-get update && apt-get install -y --no-install-recommends" in done.stderr
    for package in ("g++", "pkg-config", "libturbojpeg0-dev", "libopencv-dev"):
        assert package in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_version_and_licence_agree():
    assert f"## [{metadata.version('lvssl')}]" in (ROOT / "CHANGELOG.md").read_text()
    assert metadata.metadata("lvssl")["License-Expression"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
