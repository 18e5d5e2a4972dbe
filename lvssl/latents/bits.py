"""Numbers to integers to bits: uniform quantisers, Gray and binary digits, bytes."""

import torch
from torch import Tensor


def quantise(values: Tensor, low: float, high: float, depth: int) -> Tensor:
    """Index of each value's interval among 2^depth equal ones between low and high, int64 of that shape.

    What lies outside falls into the first or the last; what lies on a border, into the lower.
    """
    inner = torch.arange(1, 2**depth, device=values.device, dtype=values.dtype)
    return torch.bucketize(values.detach().contiguous(), low + (high - low) / 2**depth * inner)


def gray_digits(symbols: Tensor, depth: int) -> Tensor:
    """Ordered symbols [B, S] in [0, 2^depth) as bits [B, S * depth]: neighbours differ in one of them."""
    return binary_digits(symbols ^ torch.bitwise_right_shift(symbols, 1), depth)


def binary_digits(symbols: Tensor, depth: int) -> Tensor:
    """Symbols [B, S] in [0, 2^depth) as bits, bool [B, S * depth], the lowest first."""
    places = torch.arange(depth, device=symbols.device)
    shifted = torch.bitwise_right_shift(symbols[..., None], places)  # ONNX has it, the operator not
    return (shifted & 1).bool().flatten(1)


def pack(bits: Tensor) -> Tensor:
    """bool [B, D] as uint8 [B, ceil(D / 8)]: bit d in byte d // 8 at position d % 8; the rest is 0."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (padded.unflatten(1, (-1, 8)) << places).sum(dim=2, dtype=torch.uint8)
