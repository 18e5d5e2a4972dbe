"""Bits to bytes and back. Bit d of a row lies in byte d // 8 at position d % 8 (least significant first)."""

from __future__ import annotations

from typing import Any

import numpy as np


def packed_bytes(bits: int) -> int:
    """Bytes that one packed row of `bits` bits takes: ceil(bits / 8)."""
    return (bits + 7) // 8


def pack_bits(bits: Any) -> np.ndarray:
    """Packs bits [N, D] into uint8 [N, ceil(D / 8)]; the padding bits of the last byte are zero.

    `bits` is a NumPy array or a torch tensor (any device) of bool, or of numbers that are all 0 or 1.
    Raises ValueError for another shape or another value: a logit or a +-1 sample packed by mistake
    would become a code that looks fine and means nothing.
    """
    array = as_array(bits)
    if array.ndim != 2:
        raise ValueError(f"bits must have the shape [N, D], not {list(array.shape)}")
    if array.dtype != np.bool_ and array.size and not np.isin(array, (0, 1)).all():
        raise ValueError("bits must be 0 or 1; threshold the logits first (logits > 0)")
    return np.packbits(array.astype(np.bool_, copy=False), axis=1, bitorder="little")


def unpack_bits(packed: Any, bits: int) -> np.ndarray:
    """Unpacks uint8 [N, ceil(bits / 8)] into uint8 [N, bits] of 0 and 1. ValueError for another width."""
    array = as_array(packed)
    if array.ndim != 2 or array.dtype != np.uint8 or array.shape[1] != packed_bytes(bits):
        raise ValueError(
            f"codes of {bits} bits are uint8 [N, {packed_bytes(bits)}], not {array.dtype} {list(array.shape)}"
        )
    return np.unpackbits(array, axis=1, count=bits, bitorder="little")


def as_array(values: Any) -> np.ndarray:
    """A NumPy view of an array or of a torch tensor, without importing torch."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)
