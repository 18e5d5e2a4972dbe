"""`lvssl doctor` in processes of its own, where pieces are really missing or really broken."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
from lvssl.doctor import main
sys.exit(main())
"""

# Imports that take most of the doctor's time, absent where a test asks about other pieces.
LATE = {"sklearn", "nvidia.dali", "faiss", "torch", "torchvision"}


def doctor(code: str = "import sys; from lvssl.doctor import main; sys.exit(main())", **env: str):
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
    assert "every required piece works" in out
    assert pieces["torch"].startswith("ok") and torch.__version__.split("+")[0] in pieces["torch"]
    assert ("CPU only" in pieces["torch"]) == (not torch.cuda.is_available())
    assert pieces["ffcv"].startswith("ok")
    assert {
        "Python",
        "numba",
        "triton",
        "DALI",
        "submitit",
        "Slurm",
        "tensorboard",
        "disk",
        "/dev/shm",
        "cores",
    } <= set(pieces)


def a_ffcv(folder: Path, text: str) -> Path:
    """A package `ffcv` that shadows the installed one."""
    (folder / "ffcv").mkdir()
    (folder / "ffcv" / "__init__.py").write_text(text)
    return folder / "ffcv"


def test_ffcv_without_its_compiled_library(tmp_path):
    a_ffcv(tmp_path, "")
    status, pieces, out = doctor(BLOCK.format(names=LATE), PYTHONPATH=str(tmp_path))
    assert status == 1
    assert pieces["ffcv"].startswith("MISSING")
    assert f"no compiled _libffcv*.so in {tmp_path}/ffcv" in pieces["ffcv"]
    assert "libturbojpeg0-dev libopencv-dev" in pieces["ffcv"] and "'lvssl[ffcv]'" in pieces["ffcv"]
    assert out.rstrip().endswith(", ffcv")
    assert pieces["numba"].startswith("ok")


def test_ffcv_whose_library_does_not_load(tmp_path):
    (a_ffcv(tmp_path, "") / "_libffcv.so").write_bytes(b"no ELF")
    status, pieces, _ = doctor(BLOCK.format(names=LATE), PYTHONPATH=str(tmp_path))
    assert status == 1
    assert pieces["ffcv"].startswith("MISSING") and "OSError: " in pieces["ffcv"]
    assert "_libffcv.so" in pieces["ffcv"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_ffcv_whose_library_decodes_wrongly(tmp_path):
    source = tmp_path / "wrong.cpp"
    source.write_text('extern "C" int imdecode(void*, unsigned long) { return 0; }')
    library = a_ffcv(tmp_path, "") / "_libffcv.so"
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    status, pieces, _ = doctor(BLOCK.format(names=LATE), PYTHONPATH=str(tmp_path))
    assert status == 1
    assert pieces["ffcv"].startswith("MISSING") and "decodes JPEGs wrongly" in pieces["ffcv"]


def test_ffcv_whose_package_breaks_in_its_import_is_still_good_for_decoding(tmp_path):
    (real,) = (
        Path(spec.origin).parent for spec in [importlib.util.find_spec("ffcv")] if spec and spec.origin
    )
    (library,) = real.glob("_libffcv*.so")
    message = "libGL.so.1: cannot open shared object file: No such file or directory"
    shutil.copy(library, a_ffcv(tmp_path, f"raise ImportError({message!r})"))
    _, pieces, out = doctor(BLOCK.format(names=LATE), PYTHONPATH=str(tmp_path))
    assert pieces["ffcv"].startswith("missing")
    assert f"ImportError: {message}" in pieces["ffcv"]
    assert "ffcv" not in out.splitlines()[-1]


def test_without_torch_the_others_are_still_reported(tmp_path):
    status, pieces, out = doctor(BLOCK.format(names={"torch"}))
    assert status == 1
    assert pieces["torch"].startswith("MISSING") and "No module named 'torch'" in pieces["torch"]
    assert re.search(r"\$ .*pip install 'torch[<>=,.\d]+'", pieces["torch"])
    assert "torch" in out.splitlines()[-1]
    assert pieces["numba"].startswith("ok") and pieces["disk"]


def test_dali_is_optional_and_its_extra_follows_torchs_cuda():
    code = BLOCK.format(names={"nvidia.dali"}).replace(
        "sys.exit(main())",
        "import torch, lvssl.doctor\n"
        "for torch.version.cuda in ('12.8', '13.2', None):\n    print(lvssl.doctor.check_dali())",
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
