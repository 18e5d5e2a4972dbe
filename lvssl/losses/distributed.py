"""The loss across ranks: checks that the arguments agree, exchanges blocks of vectors, and takes one mean.

Each rank computes the rows of its own anchors only. It gets the other ranks' blocks in one of two ways:

    gathered   all blocks in one exchange; for small batches, where a message costs more than its bytes
    ring       each rank passes on the block that it received last while it works on it, and so holds two
               remote blocks at a time, whatever the number of ranks; from RING_FROM bytes on

Gradients need no exchange of their own; `anchors.py` says why. The backward pass sends the vectors once more,
with the denominators and weights of their anchors.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lvssl.losses.block import Block

RING_FROM = 32 * 2**20  # bytes of all ranks' vectors
MESSAGE = 512  # bytes of an error message that are sent to the other ranks
B = TypeVar("B", bound=Block)
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ranks() -> int:
    """Number of ranks of the default process group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_arguments_across_ranks(
    vectors: Tensor, temperature: float | None, name: str, problem: str
) -> list[int]:
    """Check that the ranks' arguments fit together; return the number of vectors of each rank.

    This takes one small exchange between the hosts, before anything that could wait forever for a rank that
    has left with an error. Within `equal_parts` there is no exchange.

    Raises:
        ValueError: on every rank, if one of them has a problem, if d, type or temperature differ, or if no
            rank has a vector.
    """
    if _equal_parts:
        if problem:
            raise ValueError(problem)
        return [len(vectors)] * ranks()
    facts = torch.zeros(4, dtype=torch.float64)
    if not problem:
        facts[:3] = torch.tensor([*vectors.shape, TYPES.index(vectors.dtype)])
        facts[3] = temperature or 0.0
    text = torch.tensor(list(problem.encode()[:MESSAGE].ljust(MESSAGE)), dtype=torch.uint8)
    own = torch.cat([facts.view(torch.uint8), text])
    gathered = [torch.empty_like(own) for _ in range(ranks())]
    dist.all_gather(gathered, own, group=_host_group())

    for rank, row in enumerate(gathered):
        if said := bytes(row[32:].tolist()).decode(errors="replace").strip():
            raise ValueError(f"rank {rank}: {said}")
    counts, lengths, types, temperatures = (
        torch.stack([row[:32] for row in gathered]).view(torch.float64).T.tolist()
    )
    if len(set(lengths)) > 1:
        raise ValueError(f"{name}: d must be the same on all ranks, got {[int(d) for d in lengths]}")
    if len(set(types)) > 1:
        raise ValueError(f"{name}: type must be the same on all ranks, got {[TYPES[int(t)] for t in types]}")
    if len(set(temperatures)) > 1:
        raise ValueError(f"temperature must be the same on all ranks, got {temperatures}")
    if not any(counts):
        raise ValueError(f"{name} must be [2B, d] with B >= 1 on one rank at least, got none on any")
    return [int(count) for count in counts]


@contextmanager
def equal_parts() -> Iterator[None]:
    """Context in which every rank calls the same losses with equally many vectors of one kind, as a training
    step does. The arguments needn't be compared at each loss; a rank raises its own errors alone.
    """
    _equal_parts.append(True)
    try:
        yield
    finally:
        _equal_parts.pop()


_equal_parts: list[bool] = []


def _host_group() -> Any:
    """A group whose messages don't pass through a device, so that the check doesn't wait for one."""
    group: Any = dist.group.WORLD
    if "cpu" in (str(kind) for kind in group._device_types):
        return group
    if group not in _host_groups:
        _host_groups[group] = dist.new_group(backend="gloo")
    return _host_groups[group]


_host_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def remote_blocks(block: B, counts: list[int]) -> Iterator[B]:
    """Return the blocks of all other ranks. The exchange starts at once; work on the own block meanwhile.

    Args:
        counts: number of vectors of each rank, from `check_arguments_across_ranks`.
    """
    if len(counts) == 1:
        return iter(())
    own = _packed(block)
    way = _ring if sum(counts) * own.shape[1] >= RING_FROM else _gathered
    return (_unpacked(buffer, block) for buffer in way(own, counts))


def _gathered(own: Tensor, counts: list[int]) -> Iterator[Tensor]:
    padded = own.new_zeros(max(counts), own.shape[1])
    padded[: len(own)] = own
    buffers = [torch.empty_like(padded) for _ in counts]
    work = dist.all_gather(buffers, padded, async_op=True)

    def received() -> Iterator[Tensor]:
        work.wait()
        for rank, (buffer, count) in enumerate(zip(buffers, counts)):
            if rank != dist.get_rank() and count:
                yield buffer[:count]

    return received()


def _ring(own: Tensor, counts: list[int]) -> Iterator[Tensor]:
    me, size = dist.get_rank(), len(counts)

    def exchange(outgoing: Tensor, step: int) -> tuple[Tensor, list[Any]]:
        """Pass a block on, and receive that of the rank `step` places before this one."""
        incoming = own.new_empty(counts[(me - step) % size], own.shape[1])
        operations = []
        if len(outgoing):
            operations.append(dist.P2POp(dist.isend, outgoing, (me + 1) % size))
        if len(incoming):
            operations.append(dist.P2POp(dist.irecv, incoming, (me - 1) % size))
        return incoming, dist.batch_isend_irecv(operations) if operations else []

    started = exchange(own, 1)

    def received() -> Iterator[Tensor]:
        incoming, works = started
        for step in range(1, size):
            for work in works:
                work.wait()
            arrived = incoming
            if step + 1 < size:
                incoming, works = exchange(arrived, step + 1)
            if len(arrived):
                yield arrived

    return received()


def _packed(block: Block) -> Tensor:
    """Pack a block into one buffer, [N, bytes per vector], so that it is one message."""
    numbers = torch.stack(block.per_vector(), dim=1)
    return torch.cat([block.x.view(torch.uint8), numbers.view(torch.uint8)], dim=1)


def _unpacked(buffer: Tensor, like: B) -> B:
    width = like.x.shape[1] * like.x.element_size()
    x = buffer[:, :width].contiguous().view(like.x.dtype)
    numbers = buffer[:, width:].contiguous().view(like.factors.dtype)
    return type(like)(x, *numbers.T.contiguous())


def all_reduce_sum(part: Tensor) -> Tensor:
    """Sum `part` over the ranks, on each of them. Its gradient is summed over the ranks, too."""
    return _Total.apply(part) if ranks() > 1 else part


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        part = part.clone()
        dist.all_reduce(part)
        return part

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
