"""`lvssl doctor` in processes of its own, where pieces are really missing or really broken."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from lvssl.commands import doctor as doctor_module
from lvssl.commands.doctor import PACKAGES
from pipelines.formats import turbojpeg

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
from lvssl.commands.doctor import main
sys.exit(main())
"""

# Imports that take most of the doctor's time, absent where a test asks about other pieces.
LATE = {"sklearn", "scipy", "nvidia.dali", "faiss", "torch", "torchvision"}


def doctor(code: str = "import sys; from lvssl.commands.doctor import main; sys.exit(main())", **env: str):
    """(exit status, {piece: its lines}) of a doctor run in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | env,
    )
    assert done.stderr == "" or "Traceback" not in done.stderr, done.stderr
    pieces: dict[str, str] = {}
    name = ""
    for line in done.stdout.partition("\n\n")[0].splitlines():
        start = re.match(r"(ok|low|missing|MISSING) +(\S+(?: \S+)*)  ", line)
        if start:
            name = start[2]
        pieces[name] = pieces.get(name, "") + line + "\n"
    return done.returncode, pieces, done.stdout


def test_a_whole_installation():
    status, pieces, out = doctor()
    assert status == 0, out
    assert "all required dependencies work" in out
    assert pieces["torch"].startswith("ok") and torch.__version__.split("+")[0] in pieces["torch"]
    assert ("CPU only" in pieces["torch"]) == (not torch.cuda.is_available())
    if turbojpeg.FOUND is not None:
        assert (
            pieces["libjpeg-turbo"].startswith("ok") and f"  {turbojpeg.file()}\n" in pieces["libjpeg-turbo"]
        )
    assert {
        "Python",
        "numba",
        "ffcv",
        "triton",
        "DALI",
        "submitit",
        "Slurm",
        "tensorboard",
        "disk",
        "/dev/shm",
        "cores",
    } <= set(pieces)


def test_what_is_required_is_what_the_project_depends_on():
    asked = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    assert {"torch", *PACKAGES} == {one.name for one in asked if one.marker is None or one.marker.evaluate()}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Python reads no TOML by itself")
def test_in_a_source_tree_the_bounds_are_those_of_its_pyproject(tmp_path, monkeypatch):
    """Also where another version is installed, or none."""
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["tqdm>=99"]\n')
    monkeypatch.setattr(doctor_module, "ROOT", tmp_path)
    assert str(doctor_module.requirement("tqdm")) == "tqdm>=99" and doctor_module.requirement("timm") is None
    monkeypatch.setattr(doctor_module, "ROOT", tmp_path / "elsewhere")
    assert "1.0.31" in str(doctor_module.requirement("timm"))


def test_libjpeg_turbo_is_optional(tmp_path):
    chosen = str(tmp_path / "nowhere")
    _, pieces, out = doctor(BLOCK.format(names=LATE), LVSSL_TURBOJPEG=chosen)
    assert pieces["libjpeg-turbo"].startswith("missing") and chosen in pieces["libjpeg-turbo"]
    assert "Pillow decodes" in pieces["libjpeg-turbo"] and "$ unset LVSSL" in pieces["libjpeg-turbo"]
    assert "libjpeg-turbo" not in out.splitlines()[-1]
    assert pieces["numba"].startswith("ok")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a compiler")
def test_a_libjpeg_turbo_that_decodes_wrongly(tmp_path):
    source = tmp_path / "wrong.c"
    source.write_text("""
        void* tjInitDecompress(void) { static int one; return &one; }
        void* tjInitCompress(void) { return 0; }
        int tjDestroy(void* handle) { return 0; }
        char* tjGetErrorStr2(void* handle) { return ""; }
        unsigned long tjBufSize(int width, int height, int sampling) { return 0; }
        int tjCompress2(void) { return -1; }
        int tjDecompress2(void) { return 0; }
        int tjDecompressHeader3(void* handle, void* data, unsigned long size,
                                int* w, int* h, int* sampling, int* colours) {
            *w = *h = 16; *sampling = 0; *colours = 1; return 0;
        }
    """)
    library = tmp_path / "libturbojpeg.so.0"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wno-all", source, "-o", library], check=True)
    status, pieces, out = doctor(BLOCK.format(names=LATE), LVSSL_TURBOJPEG=str(tmp_path))
    assert status == 1 and out.rstrip().endswith(", libjpeg-turbo")
    assert pieces["libjpeg-turbo"].startswith("MISSING")
    assert f"{library} decodes JPEGs wrongly" in pieces["libjpeg-turbo"]


def test_ffcv_is_optional(tmp_path):
    """A package that breaks in its import, as FFCV does where OpenCV lacks a library, or isn't there."""
    (tmp_path / "ffcv").mkdir()
    message = "libGL.so.1: cannot open shared object file: No such file or directory"
    (tmp_path / "ffcv" / "__init__.py").write_text(f"raise ImportError({message!r})")
    for names, why in ((LATE, message), (LATE | {"ffcv"}, "No module named 'ffcv'")):
        _, pieces, out = doctor(BLOCK.format(names=names), PYTHONPATH=str(tmp_path))
        assert pieces["ffcv"].startswith("missing") and why in pieces["ffcv"]
        assert "libturbojpeg0-dev libopencv-dev" in pieces["ffcv"] and "'lvssl[ffcv]'" in pieces["ffcv"]
        assert "ffcv" not in out.splitlines()[-1]


def test_without_torch_the_others_are_still_reported(tmp_path):
    status, pieces, out = doctor(BLOCK.format(names={"torch"}))
    assert status == 1
    assert pieces["torch"].startswith("MISSING") and "No module named 'torch'" in pieces["torch"]
    assert re.search(r"\$ .*pip install 'torch[<>=,.\d]+'", pieces["torch"])
    assert "torch" in out.splitlines()[-1]
    assert pieces["numba"].startswith("ok") and pieces["disk"]


def test_a_gpu_that_torch_does_not_use_is_said(tmp_path):
    """It has no usable driver, or torch is a build for CPUs, as PyPI's for aarch64 before 2.11."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code = (
        "import torch, lvssl.commands.doctor as doctor\n"
        "for torch.version.cuda in ('13.0', None):\n    print(doctor.check_torch())"
    )
    for path, status in ((str(tmp_path), "low"), (os.devnull, "ok")):
        env = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)
        lines = done.stdout.splitlines()
        assert len(lines) == 2 and all(f"status='{status}'" in line for line in lines), done.stdout
        assert ("driver" in lines[0]) == ("builds for CUDA" in lines[1]) == (status == "low")


def test_dali_is_optional_and_its_extra_follows_torchs_cuda():
    code = BLOCK.format(names={"nvidia.dali"}).replace(
        "sys.exit(main())",
        "import torch, lvssl.commands.doctor\n"
        "for torch.version.cuda in ('12.8', '13.2', None):\n    print(lvssl.commands.doctor.check_dali())",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all("status='missing'" in line and "No module named" in line for line in lines)
    for line, extra in zip(lines, ("dali-cu120", "dali-cu130", "dali-cu130")):
        assert f"pip install 'lvssl[{extra}]'" in line


def test_a_version_that_is_too_old_is_missing(tmp_path):
    (tmp_path / "tqdm").mkdir()
    (tmp_path / "tqdm" / "__init__.py").write_text("")
    (tmp_path / "tqdm-4.1.0.dist-info").mkdir()
    (tmp_path / "tqdm-4.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tqdm\nVersion: 4.1.0\n"
    )
    _, pieces, _ = doctor(BLOCK.format(names=LATE | {"ffcv"}), PYTHONPATH=str(tmp_path))
    assert pieces["tqdm"].startswith("MISSING")
    assert "4.1.0" in pieces["tqdm"] and "lvssl needs" in pieces["tqdm"] and "4.66" in pieces["tqdm"]


def test_more_threads_than_cores_are_low():
    cores = len(os.sched_getaffinity(0))
    _, pieces, _ = doctor(BLOCK.format(names=LATE | {"ffcv"}), OMP_NUM_THREADS=str(cores + 3))
    assert pieces["cores"].startswith("low")
    assert re.search(r"export OMP_NUM_THREADS=\d+", pieces["cores"])


def test_system_libraries_and_slurm_that_are_not_there(tmp_path):
    """An empty PATH has neither pkg-config nor g++ nor sbatch."""
    _, pieces, _ = doctor(BLOCK.format(names=LATE | {"ffcv"}), PATH=str(tmp_path))
    for piece, package in {
        "libturbojpeg headers": "libturbojpeg0-dev",
        "opencv4 headers": "libopencv-dev",
        "C++ compiler": "g++",
        "Slurm": "slurm-client",
    }.items():
        assert pieces[piece].startswith("missing")
        assert re.search(rf"\$ .*apt-get install .*{re.escape(package)}", pieces[piece])


def test_slurm_whose_cluster_does_not_answer(tmp_path):
    """Its commands needn't be installed again; `sbatch --version` may answer without a cluster."""
    for name, script in (("sbatch", "echo slurm 23.02"), ("sinfo", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    _, pieces, _ = doctor(BLOCK.format(names=LATE | {"ffcv"}), PATH=str(tmp_path))
    assert "its commands are installed, but no cluster answers" in pieces["Slurm"]
    assert pieces["Slurm"].startswith("missing") and "apt-get" not in pieces["Slurm"]
    assert pieces["Slurm"].endswith("$ sinfo\n")
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'main up 1:00 1 idle node'\n")
    _, pieces, _ = doctor(BLOCK.format(names=LATE | {"ffcv"}), PATH=str(tmp_path))
    assert re.fullmatch(r"ok +Slurm +slurm 23.02\n", pieces["Slurm"])
