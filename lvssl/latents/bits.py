"""Uniform quantisers, Gray and binary codes of integers, and bit packing."""

import torch
from torch import Tensor


def quantise(values: Tensor, low: float, high: float, depth: int) -> Tensor:
    """Return the index of each value's interval among 2^depth equal ones between low and high, as int64.

    Values outside fall into the first or last interval, and values on a border into the lower one.
    """
    inner = torch.arange(1, 2**depth, device=values.device, dtype=values.dtype)
    return torch.bucketize(values.detach().contiguous(), low + (high - low) / 2**depth * inner)


def gray_digits(symbols: Tensor, depth: int) -> Tensor:
    """Encode ordered symbols [B, S] in [0, 2^depth) as bits [B, S * depth]: neighbours differ in one bit."""
    return binary_digits(symbols ^ torch.bitwise_right_shift(symbols, 1), depth)


def binary_digits(symbols: Tensor, depth: int) -> Tensor:
    """Encode symbols [B, S] in [0, 2^depth) as bits, bool [B, S * depth], lowest bit first."""
    places = torch.arange(depth, device=symbols.device)
    shifted = torch.bitwise_right_shift(symbols[..., None], places)  # ONNX has this, but not the operator >>
    return (shifted & 1).bool().flatten(1)


def pack(bits: Tensor) -> Tensor:
    """Pack bool [B, D] into uint8 [B, ceil(D / 8)]: bit d is bit d % 8 of byte d // 8; the padding is 0."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (padded.unflatten(1, (-1, 8)) << places).sum(dim=2, dtype=torch.uint8)
