"""What a user gets by pip and make: the packages in the wheel, the commands, the targets."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import lvssl
from lvssl.commands import demo
from pipelines.formats import turbojpeg

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"lvssl", "pipelines", "slurm"}
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the tracked files, for a checkout may hold a `build/` that setuptools would take along."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in filter(None, tracked()):
        if (ROOT / name).exists():
            (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "src" / name).write_bytes((ROOT / name).read_bytes())
    return wheel_of(folder / "src", folder)


def wheel_of(source, folder):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    done = subprocess.run([*command, folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("lvssl-*-py3-none-any.whl")
    return built


def tracked() -> list[str]:
    command = ["git", "ls-files", "-z"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")


def test_the_wheel_holds_every_tracked_file_of_the_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    ours = {name for name in tracked() if name.split("/")[0] in PACKAGES and (ROOT / name).exists()}
    assert inside == ours
    assert {name.split("/")[0] for name in inside} == PACKAGES
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_sdist_makes_the_same_wheel(wheel, tmp_path):
    source, build = wheel.parent / "src", "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("lvssl-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (unpacked / "CHANGELOG.md").is_file() and not (unpacked / "tests").exists()
    found, expected = (
        {name: file.read(name) for name in file.namelist() if not name.endswith("RECORD")}
        for file in map(zipfile.ZipFile, (wheel_of(unpacked, tmp_path), wheel))
    )
    assert found == expected


def installed_from(wheel, tmp_path):
    """A folder with the wheel's packages and commands; what they depend on is there already."""
    installed = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", installed]
    done = subprocess.run([*command, wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return installed


@pytest.mark.slow
def test_the_demo_of_an_installed_wheel_runs_to_its_end(wheel, tmp_path):
    installed, elsewhere = installed_from(wheel, tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    code = "import lvssl, pipelines, slurm; print(lvssl.__file__, pipelines.__file__, slurm.__file__)"
    for command in ([sys.executable, "-c", code],
                    [installed / "bin/lvssl", "demo", "--data", "digits", "--epochs", "2"]):  # fmt: skip
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert str(ROOT) not in done.stdout + done.stderr
    assert (elsewhere / "runs/demo/report.html").is_file()


def test_the_commands_of_an_installed_wheel_start(wheel, tmp_path):
    """Without the checkout, whose `tools` and `benchmarks` aren't installed."""
    installed = installed_from(wheel, tmp_path)
    for command, there in (("convert-beton", "--webdataset"), ("lvssl", "pretrain")):
        done = subprocess.run(
            [sys.executable, "-v", installed / "bin" / command, "--help"],  # -v lists each module's file
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and there in done.stdout, done.stderr[-2000:]
        for package in PACKAGES:
            assert f"{ROOT / package}/" not in done.stderr
        assert f"{installed}/pipelines/" in done.stderr or f"{installed}/lvssl/" in done.stderr


def test_a_module_of_the_users_that_hides_ours_is_named(tmp_path):
    (tmp_path / "pipelines.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import lvssl; lvssl.load"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    said = f"ImportError: <module 'pipelines' from '{tmp_path / 'pipelines.py'}'> hides lvssl's package"
    assert done.stderr.splitlines()[-1].startswith(said)


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path):
    """Which takes a command's first moments; a module of this name is asked for before any argument."""
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "lvssl", "presets"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize("command", ["lvssl", "convert-beton"])
def test_help_comes_quickly_and_with_status_0(command):
    done = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout


def test_lvssl_help_does_not_wait_for_torch():
    code = (
        "import contextlib, sys\n"
        "from lvssl.commands.main import main\n"
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


TARGETS = ["demo", "test", "test-slow", "test-gpu", "test-ffcv", "test-cpus", "test-oldest"]
TARGETS += ["study", "bench", "bundle", "lint", "format"]


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_does_its_own_set_up_first(target):
    assert "tools/install.sh" in dry_run(target).splitlines()[0]


def test_what_the_targets_run():
    assert ".venv/bin/lvssl demo --out runs/demo" in dry_run("demo")
    assert '-m "not slow and not gpu and not slurm and not ffcv"' in dry_run("test")
    assert "tools/slurm_cluster.sh run .venv/bin/python -m pytest -q -m slurm" in dry_run("test-slurm")
    assert "mypy" in dry_run("lint") and "ruff format --check" in dry_run("lint")
    assert "EXTRAS='ffcv,dev,bench'" in dry_run("bench")
    assert "EXTRAS='dev'" in dry_run("test") and "EXTRAS='dev'" in dry_run("install")
    assert "EXTRAS='ffcv,dev'" in dry_run("test-ffcv") and "pytest -q -m ffcv" in dry_run("test-ffcv")
    assert "PYTHON='python3.12'" in dry_run("install", PYTHON="python3.12")
    assert ".venv" not in dry_run("clean").replace("-path './.venv*' -prune", "")


def test_the_benchmarks_of_make_need_no_argument_and_one_that_fails_does_not_hide_the_next(tmp_path):
    names = re.search(r"for name in ([a-z_ ]+);", dry_run("bench"))[1].split()
    for name in names:
        text = (ROOT / "benchmarks" / f"{name}.py").read_text()
        assert "required=True" not in text and 'raise InputError("name ' not in text
    recipe = dry_run("bench", BENCH="first second").partition("\n")[2]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    script(tmp_path / ".venv/bin/python", "echo $2; [ $2 != benchmarks.first ]")
    done = subprocess.run(["sh", "-c", recipe], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.split()[-1] == "benchmarks.second"
    assert done.stderr == "error: failed: first\n"


def test_an_unknown_processor_is_refused():
    done = subprocess.run([ROOT / "tools/test_cpus.sh", "hasvell"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "hasvell: known are host generic haswell" in done.stderr


def test_plain_make_lists_every_target():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = (ROOT / "Makefile").read_text().splitlines()
    phony = " ".join(line.removeprefix(".PHONY:") for line in lines if line.startswith(".PHONY:"))
    for target in phony.split():
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


@pytest.fixture
def bare(tmp_path):
    """Runs the installer on a machine without compiler, libraries and root: bare(EXTRAS=...)."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in (
        "bash",
        "sh",
        "dirname",
        "mkdir",
        "flock",
        "xargs",
        "sha256sum",
        "cut",
        "sed",
        "env",
        "echo",
    ):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    script(tools / "apt-get", "exit 99")
    script(tools / "id", "echo 1000")
    (tools / "python3").symlink_to(Path(sys.executable).resolve())
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "install.sh").write_bytes((ROOT / "tools" / "install.sh").read_bytes())
    (tmp_path / "pyproject.toml").write_text("")

    def run(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tools / "bash", "tools/install.sh"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={"PATH": str(tools), "HOME": str(tmp_path)} | env,
        )

    return run


def script(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_without_root_or_sudo_the_command_is_shown(bare, tmp_path):
    """For the one extra that compiles, what it compiles against."""
    done = bare(EXTRAS="dev,ffcv")
    assert done.returncode == 1
    assert "as root: apt-get update && apt-get install -y --no-install-recommends" in done.stderr
    for package in ("g++", "pkg-config", "libturbojpeg0-dev", "libopencv-dev"):
        assert package in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_ordinary_installation_asks_for_python3_venv_alone(bare, tmp_path):
    """Compiler and libraries are as absent as above; the interpreter stands in for Debian's, split in two."""
    real = Path(sys.executable).resolve()
    script(tmp_path / "bin/python3", f'case "$*" in *ensurepip*) exit 1;; esac; exec {real} "$@"')
    done = bare()
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    assert done.returncode == 1 and done.stdout == f"system packages: {version}\n"
    assert done.stderr.endswith(f"apt-get update && apt-get install -y --no-install-recommends {version}\n")
    script(tmp_path / "bin/python3", f'case "$*" in "-m venv"*) exit 3;; esac; exec {real} "$@"')
    script(tmp_path / "bin/tail", "")
    done = bare()
    assert "system packages" not in done.stdout and "virtual environment: .venv" in done.stdout
    assert done.stderr.endswith("-m venv failed (see .cache/install.log)\n")


# ---- Debian packages without root: apt-get is a script that hands out packages made here, dpkg-deb is real

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")

APT = """
echo "$*" >>{root}/asked
case "$*" in
    *Dir::State::Lists={root}/.cache/apt/lists*" update") touch {root}/lists;;
    *" download "*) [ -e {root}/lists ] || exit 100
        for name; do :; done
        [ -e {root}/$name.deb ] && cp {root}/$name.deb ./${{name}}_1.0.deb;;
    *) exit 100;;
esac
"""


def deb(root: Path, name: str, files: dict[str, bytes]) -> None:
    """{path: content} as a Debian package."""
    for path, content in files.items():
        (root / name / path).parent.mkdir(parents=True, exist_ok=True)
        (root / name / path).write_bytes(content)
    (root / name / "DEBIAN").mkdir()
    control = f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
    (root / name / "DEBIAN/control").write_text(control)
    subprocess.run(["dpkg-deb", "-b", root / name, root / f"{name}.deb"], check=True, capture_output=True)


@pytest.fixture
def packages(tmp_path):
    """Runs the installer where apt-get has no lists, and hands out what deb() has put into the folder."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "tools/install.sh").write_bytes((ROOT / "tools/install.sh").read_bytes())
    script(tmp_path / "bin/apt-get", APT.format(root=tmp_path))
    script(tmp_path / "bin/sudo", f"touch {tmp_path}/root-was-asked-for; exit 1")

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = ["bash", "tools/install.sh", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PATH": path} | env
        )
        assert not (tmp_path / "root-was-asked-for").exists()
        return done

    return run


@needs_dpkg
@pytest.mark.skipif(os.path.isdir("/usr/share/datasets/fashion-mnist"), reason="it is installed here")
def test_fashion_mnist_comes_without_root(packages, tmp_path):
    done = packages("fashion-mnist")
    assert done.returncode == 0 and "it can't be had from here" in done.stdout
    assert not (tmp_path / "data/fashion-mnist").exists()
    deb(tmp_path, "dataset-fashion-mnist", {"usr/share/datasets/fashion-mnist/x.gz": b"images"})
    assert packages("fashion-mnist").returncode == 0
    assert (tmp_path / "data/fashion-mnist/x.gz").read_bytes() == b"images"
    asked = (tmp_path / "asked").read_text()
    packages("fashion-mnist")
    assert (tmp_path / "asked").read_text() == asked, "what is there was asked for again"


def test_the_demo_looks_where_the_installer_puts_it(tmp_path, monkeypatch):
    assert demo.FASHION_MNIST[1] == ROOT / "data/fashion-mnist"
    folders = (tmp_path / "installed", tmp_path / "unpacked")
    monkeypatch.setattr(demo, "FASHION_MNIST", folders)
    assert demo.fashion_mnist() == "torchvision:FashionMNIST"
    for folder in reversed(folders):
        folder.mkdir()
        assert demo.fashion_mnist() == str(folder)


@needs_dpkg
@pytest.mark.skipif(turbojpeg.FOUND is None, reason="libturbojpeg is not installed")
@pytest.mark.parametrize("name", ["libturbojpeg0", "libturbojpeg"])  # Debian's and Ubuntu's
def test_libturbojpeg_comes_without_root(packages, tmp_path, name):
    """Into the environment, where a package of this interpreter finds it."""
    library = Path(turbojpeg.file()).read_bytes()
    deb(tmp_path, name, {"usr/lib/some-linux-gnu/libturbojpeg.so.0": library})
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    absent = {"LVSSL_TURBOJPEG": str(tmp_path / "nowhere"), "PYTHONPATH": ""}
    done = packages("turbojpeg", **absent)
    assert done.returncode == 0 and "unpacked into .venv/lib" in done.stdout, done.stdout + done.stderr
    found = subprocess.run(
        [
            tmp_path / ".venv/bin/python",
            "-c",
            "from pipelines.formats import turbojpeg; print(turbojpeg.file())",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert found.stdout == f"{tmp_path}/.venv/lib/libturbojpeg.so.0\n", found.stderr


def test_version_and_licence_agree():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert lvssl.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    of_head = ["git", "tag", "--points-at", "HEAD", "--list", "v*"]
    tags = subprocess.run(of_head, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(tags) <= {f"v{version}"}, "a tag names another version than the files: docs/contributing.md"
    assert metadata.metadata("lvssl")["License-Expression"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
