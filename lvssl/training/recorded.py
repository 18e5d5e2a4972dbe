"""A step's launches recorded once and repeated with one call, so that the host's time for each is saved."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARM = 3  # calls before the recording: what a first call compiles, tunes and allocates stays out of it


class Recorded(Generic[T]):
    """launch(full, *tensors) as a CUDA graph, for a step whose launches are the same each time.

    Nothing of `launch` may wait for the device, or depend on numbers of the host that change without
    `constants` changing: it reads its tensors, the weights and what else lies in memory that stays. What it
    gives is overwritten by the next call. On a CPU, where there is nothing to record, it is called each time.

    Args:
        launch: `full` says whether figures are wanted that most steps do without.
        context: what surrounds a recording.
    """

    def __init__(
        self,
        launch: Callable[..., T],
        device: torch.device,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.launch, self.device, self.context = launch, device, context
        self.known: Hashable = None
        self.forget()

    def forget(self) -> None:
        """What was recorded, and its memory."""
        self.warm = 0
        self.inputs: tuple[Tensor, ...] = ()
        self.replays: dict[bool, Callable[[], T]] = {}
        self.pool: Any = None

    def __call__(self, constants: Hashable, full: bool, *given: Tensor) -> T:
        """`launch(full, *given)`. `constants`: the numbers of the host on which it depends."""
        known = constants, *(tensor.shape for tensor in given)
        if known != self.known:
            self.forget()
            self.known = known
        if self.warm < WARM:
            self.warm += 1
            return self.launch(True, *given)
        if not self.inputs:
            self.inputs = tuple(torch.empty_like(tensor) for tensor in given)
        torch._foreach_copy_(self.inputs, given)
        if full not in self.replays:
            self.replays[full] = self.recorded(full)
        return self.replays[full]()

    def recorded(self, full: bool) -> Callable[[], T]:
        if self.device.type != "cuda":
            return partial(self.launch, full, *self.inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: a loader's, and the one that writes checkpoints.
        with self.context(), torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
            outputs = self.launch(full, *self.inputs)
        self.pool = graph.pool()

        def replay() -> T:
            graph.replay()
            return outputs

        return replay
