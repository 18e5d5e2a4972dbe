"""Pack bits into bytes and unpack them. Bit d of a row is bit d % 8 of byte d // 8 (lowest bit first)."""

from __future__ import annotations

from typing import Any

import numpy as np


def packed_bytes(bits: int) -> int:
    """Number of bytes of one packed row of `bits` bits: ceil(bits / 8)."""
    return (bits + 7) // 8


def pack_bits(bits: Any) -> np.ndarray:
    """Pack bits [N, D] into uint8 [N, ceil(D / 8)]; the padding bits of the last byte are zero.

    `bits` is a NumPy array or a torch tensor (on any device) of bool, or of numbers that are all 0 or 1.
    Raises ValueError for another shape or other values: packing logits or +-1 samples by mistake would give a
    code that looks valid but is meaningless.
    """
    array = as_array(bits)
    if array.ndim != 2:
        raise ValueError(f"bits must have the shape [N, D], not {list(array.shape)}")
    if array.dtype != np.bool_ and array.size and not np.isin(array, (0, 1)).all():
        raise ValueError("bits must be 0 or 1; threshold the logits first (logits > 0)")
    return np.packbits(array.astype(np.bool_, copy=False), axis=1, bitorder="little")


def unpack_bits(packed: Any, bits: int) -> np.ndarray:
    """Unpack uint8 [N, ceil(bits / 8)] into 0 and 1, uint8 [N, bits]. Raises ValueError for another width."""
    array = as_array(packed)
    if array.ndim != 2 or array.dtype != np.uint8 or array.shape[1] != packed_bytes(bits):
        raise ValueError(
            f"codes of {bits} bits are uint8 [N, {packed_bytes(bits)}], not {array.dtype} {list(array.shape)}"
        )
    return np.unpackbits(array, axis=1, count=bits, bitorder="little")


def as_array(values: Any) -> np.ndarray:
    """View an array or a torch tensor as a NumPy array, without importing torch; bfloat16, which NumPy lacks,
    becomes float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    return np.asarray(values)
