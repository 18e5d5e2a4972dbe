"""Turn uint8 crops and a table of parameters into normalised views. Three backends agree on the result:

reference   plain torch, on any device: the definition
numba       compiled for CPUs, parallel over images
triton      two GPU kernels
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import InputError
from pipelines.parameters import COLUMNS, P
from pipelines.views import ViewSettings

BACKENDS = ("reference", "numba", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# For each column: the lowest and highest value, and whether it must be a whole number.
ALLOWED = {
    "flip": (0, 1, True),
    "order": (0, 23, True),
    "brightness": (0, np.inf, False),
    "contrast": (0, np.inf, False),
    "saturation": (0, np.inf, False),
    "hue": (-0.5, 0.5, False),
    "grey": (0, 1, True),
    "sigma": (0, np.inf, False),
    "solarise": (0, 1, True),
}


def augment(
    crops: Tensor,
    table: Tensor,
    view: ViewSettings,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    checked: bool = False,
) -> Tensor:
    """Augment and normalise each crop with its own row of parameters.

    Args:
        crops: uint8 [N, R, R, 3], each crop contiguous, R = view.resolution.
        table: float32 [N, P], on the same device; columns as in `pipelines.parameters.COLUMNS`. The crop box
            has already been applied and is ignored.
        view: only resolution, mean and std are used.
        backend: one of BACKENDS, or auto: triton on a GPU, numba on a CPU.
        dtype: dtype of the result: float32, float16 or bfloat16.
        checked: skip the range check of the table, as for one made by `draw_parameters`. On a GPU this
            avoids a synchronisation.

    Returns:
        [N, 3, R, R], channels-last in memory.

    Raises:
        InputError: wrong dtype, shape, layout or device, or a parameter that is NaN or out of range. The
            message names the argument, and the first row and column.
    """
    check_shapes(crops, table, view)
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(name, DTYPES))}, got {name(dtype)}")
    backend = backend_for(crops.device, backend)
    if not checked:
        check_values(table.detach().cpu().numpy())
    if backend == "triton":
        from pipelines.augment import gpu

        return gpu.augment(crops, table.contiguous(), view, dtype)
    if backend == "numba":
        return _on_threads(crops.numpy(), table.numpy(), view).to(dtype)
    from pipelines.augment import reference

    return reference.augment(crops, table, view, dtype)


def augmenter_for(
    device: torch.device, backend: str = "auto", dtype: torch.dtype = torch.float32
) -> Callable[..., Tensor] | None:
    """Return the augmenter that `TwoViewLoader` takes: a backend that runs on the device of the batch.

    None stands for numba, which the loader's workers run themselves on the CPU, wherever the batch goes
    afterwards; it returns float32. The others return `dtype`; passing autocast's dtype saves a cast. Raises
    InputError as `backend_for` does.
    """
    if backend == "numba" or backend_for(device, backend) == "numba":
        return None
    return partial(augment, backend=backend_for(device, backend), dtype=dtype, checked=True)


def backend_for(device: torch.device, wanted: str = "auto") -> str:
    """Return the backend to run on this device. Raises InputError if the one that was asked for doesn't."""
    if wanted == "auto":
        return "triton" if device.type == "cuda" else "numba"
    if wanted not in BACKENDS:
        raise InputError(f"unknown backend {wanted!r}; known: auto, {', '.join(BACKENDS)}")
    if wanted == "triton" and device.type != "cuda":
        raise InputError(f"backend triton needs crops on a GPU, they are on {device}; leave it out, or numba")
    if wanted == "numba" and device.type != "cpu":
        raise InputError(f"backend numba needs crops on the CPU, they are on {device}; leave it out")
    return wanted


def check_shapes(crops: Tensor, table: Tensor, view: ViewSettings) -> None:
    """Raise InputError, naming the argument, for inputs that no backend accepts."""
    side = view.resolution
    if crops.dtype != torch.uint8:
        raise InputError(f"crops must be uint8, got {name(crops.dtype)}")
    if crops.ndim != 4 or tuple(crops.shape[1:]) != (side, side, 3):
        raise InputError(f"crops must have shape [N, {side}, {side}, 3], got {list(crops.shape)}")
    if len(crops) and crops.stride()[1:] != (3 * side, 3, 1):
        raise InputError(
            f"crops must be contiguous, channels last: strides [*, {3 * side}, 3, 1], got {crops.stride()}"
        )
    if table.dtype != torch.float32:
        raise InputError(f"table must be float32, got {name(table.dtype)}")
    if tuple(table.shape) != (len(crops), P):
        raise InputError(f"table must have shape [{len(crops)}, {P}] like crops, got {list(table.shape)}")
    if table.device != crops.device:
        raise InputError(f"table is on {table.device}, crops on {crops.device}")


def check_values(table: np.ndarray) -> None:
    """Raise InputError naming the first row and column that is NaN or out of range."""
    columns = [COLUMNS.index(name) for name in ALLOWED]
    low, high, whole = map(np.array, zip(*ALLOWED.values()))
    values = table[:, columns]
    good = np.isfinite(values) & (values >= low) & (values <= high) & (~whole | (values == np.rint(values)))
    if good.all():
        return
    row, k = np.argwhere(~good)[0]
    kind = "a whole number" if whole[k] else "finite and"
    raise InputError(
        f"table[{row}, {columns[k]}] ({COLUMNS[columns[k]]} of crop {row}) must be {kind} "
        f"in [{low[k]:g}, {high[k]:g}], got {values[row, k]:g}"
    )


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_threads(crops: np.ndarray, table: np.ndarray, view: ViewSettings) -> Tensor:
    """Run the numba backend on as many threads as torch has, each with its part of the batch."""
    from pipelines.augment import cpu

    out = np.empty(crops.shape, np.float32)
    threads = torch.get_num_threads()
    share = max(1, -(-len(crops) // threads))

    def run(start: int) -> None:
        part = slice(start, start + share)
        cpu.augment_into(crops[part], table[part], view, out[part])

    if len(crops) <= share:  # starting a thread takes longer than augmenting a small image
        run(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(0, len(crops), share)))
    return torch.from_numpy(out).permute(0, 3, 1, 2)
