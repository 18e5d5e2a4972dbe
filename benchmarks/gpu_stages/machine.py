"""The versions in use, and the card's measured limits: copies and a matrix product."""

import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_stages.case import Case, Row, Setup
from benchmarks.gpu_stages.timing import timed

PACKAGES = (
    "torch", "torchvision", "triton", "numpy", "numba", "timm", "tyro", "safetensors", "pyarrow",
    "scikit-learn", "scipy", "tensorboard", "tqdm", "pillow", "pytest", "pytest-xdist",
    "hypothesis", "submitit", "lightly", "kornia", "kornia_rs",
)  # fmt: skip
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def cases(setup: Setup) -> Iterator[Case]:
    yield Case("versions", versions)
    yield Case("turbojpeg", turbojpeg)
    if setup.device == "cuda":
        yield Case("nvidia-smi", nvidia_smi)
    yield Case("device copy", lambda: device_copy(setup))
    if setup.device == "cuda":
        yield Case("pinned copy to the device", lambda: pinned_copy(setup))
    yield Case("bf16 product", lambda: product(setup))
    yield Case("fp32 product", lambda: product(setup, torch.float32))


def versions() -> Row:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    missing = [name for name, number in found.items() if number == "missing"]
    return {
        "ok": None,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "missing": ", ".join(missing) or "nothing",
        "packages": found,
    }


def turbojpeg() -> Row:
    """Whether libjpeg-turbo was found; without it no .beton and no JPEG can be read at speed."""
    from pipelines.decode.turbo import AVAILABLE

    return {"ok": None} if AVAILABLE else {"ok": None, "failed": "missing: libturbojpeg"}


def nvidia_smi() -> Row:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return {"ok": None, "failed": "missing: nvidia-smi"}
    values = said.stdout.splitlines()[0].split(", ") if said.stdout else []
    return {"ok": None, **dict(zip(QUERY.split(","), values))}


def device_copy(setup: Setup) -> Row:
    """Bytes read and written per second by a copy of 4 GiB within the device's memory."""
    size = 16 * 2**20 if setup.dry else 4 * 2**30
    source = torch.randint(256, (size // 64,), dtype=torch.uint8, device=setup.device).repeat(64)
    target = torch.empty_like(source)
    row = timed(setup, lambda: target.copy_(source))
    right = bool((target == source).all())
    return {"ok": right, **row, "bytes": 2 * size, "rate": 2 * size / row["seconds"]}


def pinned_copy(setup: Setup) -> Row:
    """Bytes per second from page-locked memory to the device, with 512 MB."""
    size = 512 * 10**6
    source = torch.randint(256, (size,), dtype=torch.uint8).pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=setup.device)
    row = timed(setup, lambda: target.copy_(source, non_blocking=True))
    return {"ok": True, **row, "bytes": size, "rate": size / row["seconds"]}


def product(setup: Setup, dtype: torch.dtype = torch.bfloat16) -> Row:
    """Operations per second of a product of random matrices with 8,192 rows (zeros would run faster)."""
    side = 256 if setup.dry else 8192
    a, b = (torch.randn(side, side, device=setup.device).to(dtype) for _ in range(2))
    row = timed(setup, lambda: a @ b)
    operations = 2 * side**3
    return {"ok": True, **row, "operations": operations, "rate": operations / row["seconds"]}


def ceilings(setup: Setup) -> Row:
    """This card's measured bytes and operations per second; measured now if they weren't before."""
    found = {row["name"]: row for row in setup.earlier() if row["stage"] == "machine" and row.get("ok")}
    if "device copy" not in found or "bf16 product" not in found:
        found = {"device copy": device_copy(setup), "bf16 product": product(setup)}
    return {"bytes": found["device copy"]["rate"], "operations": found["bf16 product"]["rate"]}
