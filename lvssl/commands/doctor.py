"""`lvssl doctor`: report what is installed or missing, what works without it, and how to install it.

Only the standard library is imported before its check runs, and a package that fails to import, for whatever
reason, becomes a line of the report without stopping it. If the command line itself doesn't start, `python -m
lvssl.commands.doctor` still does.
"""

import importlib
import importlib.metadata as metadata
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pipelines.cores import cores

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OK, LOW, ABSENT, REQUIRED = "ok", "low", "missing", "MISSING"

# Distribution -> module, for each of pyproject.toml's dependencies but torch. Their versions are compared
# with lvssl's requirements.
PACKAGES = {
    "numpy": "numpy",
    "torchvision": "torchvision",
    "numba": "numba",
    "pillow": "PIL.Image",
    "pyarrow": "pyarrow.parquet",
    "scikit-learn": "sklearn",
    "scipy": "scipy.stats",
    "safetensors": "safetensors.torch",
    "tensorboard": "torch.utils.tensorboard",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "tqdm": "tqdm",
    "tyro": "tyro",
    "submitit": "submitit",
    "timm": "timm.utils",
}
if sys.version_info < (3, 11):
    PACKAGES["tomli"] = "tomli"
ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what is checked.
        status: "ok"; "low" (works, but scarce or badly set); "missing" (optional, absent or broken);
            "MISSING" (required, absent or broken).
        found: its version or size, or its error message; one line.
        without: what works, or doesn't, in this state; empty if all is well.
        command: the command that fixes it; empty if there is none.
    """

    name: str
    status: str
    found: str
    without: str = ""
    command: str = ""


def check() -> list[Check]:
    """Run all checks, in the order of the report. Takes seconds, because packages are imported."""
    checks: list[Callable[[], Check]] = [
        check_python,
        check_torch,
        check_cores,  # before FFCV's package, which sets torch to one thread when imported
        *(lambda name=name: check_package(name) for name in PACKAGES),
        check_libjpeg_turbo,
        # Optional: `pipelines` reads and writes .beton files itself; only benchmarks use FFCV's loader.
        lambda: check_optional(
            "ffcv",
            "ffcv",
            "conversion and training work; only benchmarks against FFCV's own loader don't",
            f"{apt_install('libturbojpeg0-dev libopencv-dev pkg-config g++')} && "
            + pip_install("lvssl[ffcv]"),
        ),
        lambda: check_headers("libturbojpeg", "libturbojpeg0-dev"),
        lambda: check_headers("opencv4", "libopencv-dev"),
        lambda: check_program(
            "C++ compiler",
            ("g++", "--version"),
            "no g++",
            "everything works except building FFCV, torch.compile and Triton kernels",
            "g++",
        ),
        lambda: check_optional(
            "triton", "triton", "the CPU and plain torch versions of every kernel work", pip_install("triton")
        ),
        check_dali,
        lambda: check_optional(
            "faiss",
            "faiss-cpu",
            "everything works except product quantisation; Hamming search has its own, faster kernels",
            pip_install("lvssl[faiss]"),
        ),
        check_slurm,
        check_disk,
        check_shared_memory,
    ]
    return [one() for one in checks]


def main() -> int:
    """Print the checks. Exit status 0 if all required dependencies work, else 1."""
    checks = check()
    width = max(len(c.name) for c in checks)
    for c in checks:
        print(f"{c.status:<8} {c.name:<{width}}  {c.found}")
        if c.status != OK:
            consequence = f"without it: {c.without}" if c.status == ABSENT else c.without
            for line in (consequence, c.command and f"$ {c.command}"):
                if line:
                    print(" " * (9 + width + 2) + line)
    broken = [c.name for c in checks if c.status == REQUIRED]
    verdict = f"required and not working: {', '.join(broken)}" if broken else "all required dependencies work"
    print(f"\n{verdict}")
    return 1 if broken else 0


# ---- Python packages


def load(module: str) -> tuple[ModuleType | None, str]:
    """Return the module, or None and the error in one line. A broken package may raise anything."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def requirement(distribution: str) -> "Requirement | None":
    """Return lvssl's requirement for a distribution; None if it is unknown."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return None
    return next((r for r in map(Requirement, dependencies()) if r.name == distribution), None)


def dependencies() -> list[str]:
    """Return the dependencies of the source tree that this runs from, or of the installed lvssl; empty if
    neither can be read."""
    try:
        import tomllib

        return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    except (ImportError, OSError):
        try:
            return metadata.requires("lvssl") or []
        except metadata.PackageNotFoundError:
            return []


def pip_install(what: str) -> str:
    """Return a pip command for this interpreter's environment, whether or not it is activated."""
    beside = Path(sys.executable).with_name("pip")
    found = shutil.which("pip")
    if found and Path(found) == beside:
        return f"pip install '{what}'"
    if beside.exists():
        here = Path.cwd()
        return f"{beside.relative_to(here) if beside.is_relative_to(here) else beside} install '{what}'"
    return f"{sys.executable} -m pip install '{what}'"


def apt_install(packages: str) -> str:
    return f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install {packages}"


def check_python() -> Check:
    # No version check is needed: pip refuses lvssl on a Python that is too old.
    return Check("Python", OK, f"{sys.version.split()[0]} ({sys.prefix})")


def check_package(distribution: str) -> Check:
    """Check that a required package imports and has a version that lvssl supports."""
    asked = requirement(distribution)
    command = pip_install(f"{asked.name}{asked.specifier}" if asked else distribution)
    module, failure = load(PACKAGES.get(distribution, distribution))
    if module is None:
        return Check(distribution, REQUIRED, failure, "lvssl needs it", command)
    found = version(distribution)
    if asked and found and not asked.specifier.contains(found, prereleases=True):
        return Check(distribution, REQUIRED, found, f"lvssl needs {asked.specifier}", command)
    return Check(distribution, OK, found)


def check_torch() -> Check:
    base = check_package("torch")
    if base.status != OK:
        return base
    import torch

    if not torch.cuda.is_available():
        found = f"{base.found}, CPU only"
        if not shutil.which("nvidia-smi"):
            return Check("torch", OK, found)
        if torch.version.cuda:
            why = f"torch (CUDA {torch.version.cuda}) sees no GPU: is the driver too old?"
            return Check("torch", LOW, found, f"nvidia-smi exists, but {why}", "nvidia-smi")
        why = (
            "this torch is built for CPUs alone: uninstall torch and torchvision, and install builds for CUDA"
        )
        return Check("torch", LOW, found, f"nvidia-smi exists, but {why}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))
    return Check("torch", OK, f"{base.found}, CUDA {torch.version.cuda}, {kinds}")


def check_libjpeg_turbo() -> Check:
    """Check where the JPEG library was found, and that it decodes an image as Pillow does."""
    from pipelines.formats import turbojpeg

    if turbojpeg.FOUND is None:
        chosen = os.environ.get(turbojpeg.VARIABLE)
        failure = f"{turbojpeg.VARIABLE}={chosen} can't be loaded" if chosen else "none found that loads"
        without = "Pillow decodes JPEGs instead: the same pixels, more slowly, and less damage is detected"
        mend = "make install" if (ROOT / "tools/install.sh").exists() else apt_install("libturbojpeg0")
        return Check(
            "libjpeg-turbo", ABSENT, failure, without, f"unset {turbojpeg.VARIABLE}" if chosen else mend
        )
    try:
        failure = wrongly_decoded()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    if failure:
        without = "JPEGs are decoded wrongly"
        mend = f"export {turbojpeg.VARIABLE}=FILE   # another library, or none for Pillow"
        return Check("libjpeg-turbo", REQUIRED, f"{turbojpeg.file()} {failure}", without, mend)
    return Check("libjpeg-turbo", OK, turbojpeg.file())


def wrongly_decoded() -> str:
    """Return what is wrong with the library, or "". May raise whatever a broken package raises."""
    import numpy as np
    from PIL import Image

    from pipelines.formats import jpeg

    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file, "JPEG", quality=95)
    pixels = jpeg.decode(file.getvalue(), jpeg.read_header(file.getvalue()))
    if np.abs(pixels.astype(int) - np.asarray(Image.open(file))).max() > 4:
        return "decodes JPEGs wrongly"
    return ""


def check_optional(name: str, distribution: str, without: str, command: str) -> Check:
    """Check a package that is only needed for some things."""
    module, failure = load(name)
    if module is None:
        return Check(name, ABSENT, failure, without, command)
    return Check(name, OK, version(distribution) or getattr(module, "__version__", ""))


def check_dali() -> Check:
    """Check DALI, which has a distribution for each major version of CUDA; torch's version is suggested."""
    module, failure = load("nvidia.dali.fn")
    if module is not None:
        found = next((v for v in map(version, ("nvidia-dali-cuda130", "nvidia-dali-cuda120")) if v), "")
        return Check("DALI", OK, found)
    if version("nvidia-dali"):
        failure += "; the distribution `nvidia-dali` is an empty placeholder"
    torch, _ = load("torch")
    cuda = getattr(getattr(torch, "version", None), "cuda", None) or "13"
    extra = f"dali-cu{cuda.split('.')[0]}0"
    return Check(
        "DALI", ABSENT, failure, "everything works except --source dali", pip_install(f"lvssl[{extra}]")
    )


# ---- System


def output(*command: str) -> str:
    """Return the first line of a command's output; empty if it is absent, fails or takes 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.splitlines() or [""])[0] if done.returncode == 0 else ""


def check_program(name: str, command: Sequence[str], unanswered: str, without: str, packages: str) -> Check:
    """Check that a command answers; `unanswered` is what to report if it doesn't."""
    found = output(*command)
    if found:
        return Check(name, OK, found)
    failure = unanswered if shutil.which(command[0]) else f"no {command[0]}"
    return Check(name, ABSENT, failure, without, apt_install(packages))


def check_slurm() -> Check:
    """Check that Slurm's commands are installed and that a cluster answers them."""
    without = "plain python and torchrun work; jobs are submitted from a cluster's login node"
    if not shutil.which("sbatch"):
        return Check("Slurm", ABSENT, "no sbatch", without, apt_install("slurm-client"))
    if not output("sinfo", "-h"):
        return Check("Slurm", ABSENT, "its commands are installed, but no cluster answers", without, "sinfo")
    return Check("Slurm", OK, output("sbatch", "--version"))


def check_headers(module: str, package: str) -> Check:
    asked = ("pkg-config", "--modversion", module)
    without = "FFCV works if it is already built; building it needs them"
    return check_program(
        f"{module} headers", asked, "unknown to pkg-config", without, f"{package} pkg-config"
    )


def check_disk() -> Check:
    """Check the free space in the default place of runs."""
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free / GIB
    found = f"{free:.1f} GiB free at {folder}"
    if free < 5:
        without = "the demo needs under 1 GiB, ImageNet as .beton 20 to 140"
        return Check("disk", LOW, found, without, f"du -xhd1 {folder}")
    return Check("disk", OK, found)


def check_shared_memory() -> Check:
    """Check shared memory. Containers get 64 MiB by default; NCCL and torch's loader workers use it."""
    try:
        size = shutil.disk_usage("/dev/shm").total / GIB
    except OSError as error:
        return Check("/dev/shm", LOW, str(error), "processes can't share tensors", "docker run --shm-size=8g")
    if size < 1:
        without = "one process works; several on one machine may crash with a bus error"
        return Check("/dev/shm", LOW, f"{size:.2f} GiB", without, "docker run --shm-size=8g")
    return Check("/dev/shm", OK, f"{size:.1f} GiB")


def cpu_quota() -> float | None:
    """Return the number of cores that the control group allows; None for no limit (cgroup v2, then v1)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{n}_us").read_text().strip() for n in ("quota", "period")
            )
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def check_cores() -> Check:
    """Check the number of threads: threads beyond the available cores only wait for each other."""
    allowed = cores()
    quota = cpu_quota()
    usable = min(allowed, max(1, int(quota))) if quota else allowed
    set_by = {
        name: os.environ[name] for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS") if name in os.environ
    }
    torch, _ = load("torch")
    found = f"{usable} usable of {os.cpu_count()}"
    found += f", torch uses {torch.get_num_threads()} threads" if torch else ""
    found += "".join(f", {name}={value}" for name, value in set_by.items())
    threads = [int(value) for value in set_by.values() if value.isdigit()]
    threads += [torch.get_num_threads()] if torch else []
    if max(threads, default=1) > usable:
        without = "works, but more threads than cores are slower"
        command = " ".join(["export", *(f"{name}={usable}" for name in set_by or ["OMP_NUM_THREADS"])])
        return Check("cores", LOW, found, without, command)
    return Check("cores", OK, found)


if __name__ == "__main__":
    sys.exit(main())
