"""Record a step's launches once and replay them with one call, which saves the host's time for each."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARM = 3  # calls before the recording, which keep compilation, tuning and first allocations out of it


class Recorded(Generic[T]):
    """launch(full, *tensors) as a CUDA graph, for a step whose launches are the same each time.

    `launch` may not wait for the device, nor depend on host values that change unless `constants` do: it
    reads its tensors, the weights, and other memory that isn't freed. Its results are overwritten by the next
    call. On a CPU there is nothing to record, and `launch` is called each time.

    Args:
        launch: `full` says whether to compute figures that most steps do without.
        context: the context of a recording.
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
        """Drop the recordings and their memory."""
        self.warm = 0
        self.inputs: tuple[Tensor, ...] = ()
        self.replays: dict[bool, Callable[[], T]] = {}
        self.pool: Any = None

    def __call__(self, constants: Hashable, full: bool, *given: Tensor) -> T:
        """Return `launch(full, *given)`. `constants`: the host values on which it depends."""
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
        # Other threads go on meanwhile: the loader's, and the one that writes checkpoints.
        with self.context(), torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
            outputs = self.launch(full, *self.inputs)
        self.pool = graph.pool()

        def replay() -> T:
            graph.replay()
            return outputs

        return replay
