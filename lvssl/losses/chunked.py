"""The engine in plain torch, for CPUs and for GPUs without Triton. It computes the logits tile by tile.

Both functions take `rows`, the block with the anchors, and `columns`, the vectors they are compared with: the
same block, or that of another rank. The logits of a block with itself are symmetric, so only tiles on and
above the diagonal are computed, and each serves its rows and its columns.

If no logit can exceed BOUND (any temperature from 0.02 up), exponentials are taken without a shift: e^-50 to
e^50, sums of a million of them and their inverses fit into fp32. No maximum has to be found, nothing is
rescaled, and one exponential serves its row and its column. Otherwise each row is shifted by its maximum.

Slower at 2B = 2,048 and 8,192: tiles of 128 and 256 (more calls), and of 1,024 and up (beyond the caches).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lvssl.losses.block import Block, Weighed

BOUND = 50.0
TILE = {"cpu": 512, "cuda": 4096}


def log_sum_exp(rows: Block, columns: Block, excluded: tuple[int, ...], bound: float) -> Tensor:
    """Return log sum_j exp(v_i . v_j) over the columns, [rows]; -inf if all are excluded or there are none.

    Args:
        excluded: offsets o such that row i is not compared with column i + o; symmetric about 0, and empty
            unless the blocks are the same.
        bound: upper bound of the logits.
    """
    v, u = rows.vectors(), columns.vectors()
    if bound > BOUND:
        return _shifted_log_sum_exp(v, u, excluded)
    sums = v.new_zeros(len(v))
    for i, j, exponentials in _tiles(v, u, rows is columns):
        exponentials.exp_()
        _clear(exponentials, i, j, excluded, 0.0)
        sums[i] += exponentials.sum(1)
        if rows is columns and i != j:
            sums[j] += exponentials.sum(0)
    return sums.log()


def gradient(rows: Weighed, columns: Weighed, excluded: tuple[int, ...], bound: float) -> Tensor:
    """sum_j (g_i exp(v_i . v_j - denominator_i) + g_j exp(v_i . v_j - denominator_j)) v_j, [rows, d].

    g are the weights of the blocks; the denominators are over all columns of all ranks.
    """
    v, u = rows.vectors(), columns.vectors()
    grad = torch.zeros_like(v)
    if bound > BOUND:
        for i, j, logits in _tiles(v, u, False):
            _clear(logits, i, j, excluded, float("-inf"))
            shares = (logits - rows.denominators[i, None]).exp_().mul_(rows.weights[i, None])
            logits.sub_(columns.denominators[j]).exp_().mul_(columns.weights[j])
            grad[i].addmm_(shares.add_(logits), u[j])
        return grad
    of_row, of_column = (b.weights * (-b.denominators).exp() for b in (rows, columns))
    for i, j, exponentials in _tiles(v, u, rows is columns):
        exponentials.exp_()
        _clear(exponentials, i, j, excluded, 0.0)
        exponentials.mul_(of_row[i, None] + of_column[j])
        grad[i].addmm_(exponentials, u[j])
        if rows is columns and i != j:
            grad[j].addmm_(exponentials.T, v[i])
    return grad


def _shifted_log_sum_exp(v: Tensor, u: Tensor, excluded: tuple[int, ...]) -> Tensor:
    found = v.new_full((len(v),), float("-inf"))
    for i, j, logits in _tiles(v, u, False):
        _clear(logits, i, j, excluded, float("-inf"))
        highest = logits.amax(1).clamp(min=torch.finfo(v.dtype).min)  # finite if all are excluded
        sums = logits.sub_(highest[:, None]).exp_().sum(1)
        found[i] = torch.logaddexp(found[i], sums.log() + highest)
    return found


def _tiles(v: Tensor, u: Tensor, symmetric: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows, columns and logits of each tile; the next tile reuses the memory of the logits."""
    size = TILE.get(v.device.type, TILE["cpu"])
    memory = v.new_empty(min(size, len(v)) * min(size, len(u)))
    for top in range(0, len(v), size):
        i = slice(top, min(top + size, len(v)))
        for left in range(top if symmetric else 0, len(u), size):
            j = slice(left, min(left + size, len(u)))
            shape = (i.stop - i.start, j.stop - j.start)
            yield i, j, torch.mm(v[i], u[j].T, out=memory[: shape[0] * shape[1]].view(shape))


def _clear(tile: Tensor, i: slice, j: slice, excluded: tuple[int, ...], value: float) -> None:
    """Write `value` where row and column are an `excluded` offset apart."""
    height, width = tile.shape
    for offset in excluded:
        diagonal = offset + i.start - j.start
        if -height < diagonal < width:
            tile.diagonal(diagonal).fill_(value)
