"""Several processes, one run: find this process's rank, connect the ranks, and notice if one dies.

The same entry serves plain `python` (one process, no group), `torchrun` and Slurm's `srun`; the environment
variables tell which it is. CPU tensors are sent by gloo, GPU tensors by NCCL.
"""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lvssl.training.stopping import Interrupted
from pipelines.errors import InputError

SAID_AFTER = 5.0  # seconds of waiting after which a line says for whom
BEAT, DEAD_AFTER = 5.0, 40.0  # seconds between heartbeats, and without one until a rank counts as dead
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among the processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank on this machine, which selects the GPU."""
    host: str = ""
    port: int = 0
    """Where rank 0 waits for the others."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0


def world_of(environment: Mapping[str, str] = os.environ) -> World:
    """Read the variables of torchrun or of a Slurm step; without them, there is one process.

    Raises:
        InputError: the variables don't fit together.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        if missing := [name for name in torchrun if name not in environment]:
            raise InputError(f"{missing[0]} is not set, but RANK is: start with torchrun, or unset RANK")
        rank, size, local, port = (_number(environment, name) for name in (*torchrun[:3], torchrun[4]))
        world = World(rank, size, local, environment["MASTER_ADDR"], port)
    elif _in_slurm_step(environment):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        rank, size, local = (_number(environment, name) for name in names)
        host = first_host(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
        world = World(rank, size, local, host, port_of_job(environment))
    else:
        return World()
    if not 0 <= world.rank < world.size:
        raise InputError(f"rank {world.rank} of {world.size}: a rank must be in [0, {world.size})")
    return world


def _in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script has the same variables, but is one process."""
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")
    batch_script = environment.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environment
    return all(name in environment for name in names) and not batch_script


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise InputError(f"{name} must be a whole number, got {environment[name]!r}") from error


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's node list: "gpu[07-09,12],login" -> "gpu07"."""
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", nodes).split(",")[0]


def port_of_job(environment: Mapping[str, str]) -> int:
    """Return a port for this job and step, so that two jobs on one machine don't connect to each other."""
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    return 10_000 + (int(job) * 7 + (int(step) if step.isdigit() else 0)) % 20_000  # below the ephemeral ones


@contextmanager
def connected(world: World, device: torch.device, timeout_minutes: float = 10.0) -> Iterator[None]:
    """Open a process group while the block runs; none for one process.

    Raises:
        InputError: the ranks didn't connect in time, or the port is taken; names host, port and rank.
        ConnectionError: another rank left or died meanwhile.
    """
    if world.size == 1:
        yield
        return
    store = meet(world, timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    heartbeat = Heartbeat(world, store)
    try:
        yield
    except Interrupted:  # on all ranks at once
        leave(heartbeat)
        raise
    except RuntimeError as error:
        heartbeat.stop()
        if not lost(error):
            raise
        raise ConnectionError(gone(world, "another rank", str(error).splitlines()[0])) from error
    except BaseException:
        heartbeat.stop()  # the others see the connection close
        raise
    else:
        leave(heartbeat)


def meet(world: World, timeout_minutes: float) -> dist.Store:
    """Return the store that all ranks share, once all have connected."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself keeps the store
    wait = timedelta(minutes=timeout_minutes)
    where = f"rank {world.rank} of {world.size}, on {socket.gethostname()}: {{}} {world.host}:{world.port}"
    listens, begun, told = world.first and not agent, time.monotonic(), False

    def wait_on(whom: str) -> bool:
        """Wait a moment, in Python, so that Ctrl-C works; return False once the timeout is over."""
        nonlocal told
        waited = time.monotonic() - begun
        if waited > SAID_AFTER and not told:
            print(_awaiting(world, whom, wait), file=sys.stderr, flush=True)
            told = True
        time.sleep(0.05)
        return waited < wait.total_seconds()

    while not listens and not _answers(world):
        if not wait_on("rank 0"):
            raise InputError(where.format(f"nobody answered within {wait} at"))
    try:
        tcp = dist.TCPStore(world.host, world.port, None, listens, wait, wait_for_workers=False)
    except RuntimeError as error:
        verb = "can't listen at" if world.first and not agent else f"nobody answered within {wait} at"
        raise InputError(f"{where.format(verb)} ({str(error).splitlines()[0][:200]})") from error
    store = dist.PrefixStore(f"lvssl/{restart}", tcp)
    store.set(f"here/{world.rank}", "")
    for rank in range(world.size):
        while not store.check([f"here/{rank}"]):
            if not wait_on(f"rank {rank}"):
                raise InputError(where.format(f"rank {rank} did not connect within {wait} to"))
    return store


def _awaiting(world: World, whom: str, wait: timedelta) -> str:
    """One line on who is awaited, and where."""
    by_slurm = "RANK" not in os.environ
    alone = (
        f"; Slurm's variables say {world.size} processes: start them with srun, or unset SLURM_NTASKS for one"
    )
    return (
        f"rank {world.rank} of {world.size}: waiting up to {wait} for {whom} at {world.host}:{world.port} "
        f"(Ctrl-C ends it){alone if by_slurm else ''}"
    )


def _answers(world: World) -> bool:
    """Whether anything listens where rank 0 should; torch's own wait can't be interrupted."""
    try:
        socket.create_connection((world.host, world.port), timeout=1).close()
    except OSError:
        return False
    return True


def leave(heartbeat: "Heartbeat") -> None:
    """Leave the group together with all other ranks, so that none takes an orderly end for a death."""
    heartbeat.stop()
    dist.barrier()
    dist.destroy_process_group()


def lost(error: RuntimeError) -> bool:
    """Whether the error says that another rank died or disconnected."""
    words = ("gloo", "connection closed", "timed out", "broken pipe", "connection reset", "nccl")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def gone(world: World, who: str, why: str) -> str:
    where = (
        f"rank {world.rank} of {world.size} on {socket.gethostname()} (meeting at {world.host}:{world.port})"
    )
    remedy = "The last checkpoint is complete: restart all ranks with --resume"
    return f"{where}: {who} died or disconnected ({why}). {remedy}"


class Heartbeat:
    """A thread that sends heartbeats through the store, and ends this process when another's are missing.

    A rank whose machine died closes no connection, and a rank that waits in a collective notices nothing.
    """

    def __init__(self, world: World, store: dist.Store) -> None:
        self.world = world
        self.stopped = threading.Event()
        self.store = store.clone() if hasattr(store, "clone") else store  # a connection of its own
        self.thread = threading.Thread(target=self.beat, name="heartbeat", daemon=True)
        self.thread.start()

    def beat(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        count = 0
        while not self.stopped.wait(BEAT if count else 0):
            count += 1
            try:
                dead = self.silent(seen, str(count))
            except RuntimeError as error:
                self.end("rank 0", str(error).splitlines()[0])
            else:
                if dead is not None:
                    self.end(f"rank {dead}", f"no sign of life for {DEAD_AFTER:.0f} s")

    def silent(self, seen: dict[int, tuple[bytes, float]], sign: str) -> int | None:
        """Send a heartbeat and check the others'; return a rank that has sent none for too long, or None.

        Rank 0 checks all ranks and says which is dead; the others check rank 0 and what it says. That takes a
        few requests per rank, where checking each other would take the square of their number.
        """
        self.store.set(f"beat/{self.world.rank}", sign)
        for rank in range(self.world.size) if self.world.first else (0,):
            if self.store.check([f"beat/{rank}"]):
                value = self.store.get(f"beat/{rank}")
                if rank not in seen or seen[rank][0] != value:
                    seen[rank] = value, time.monotonic()
        now = time.monotonic()
        dead = next((rank for rank, (_, last) in seen.items() if now - last > DEAD_AFTER), None)
        if self.world.first and dead is not None:
            self.store.set("dead", str(dead))
        elif not self.world.first and self.store.check(["dead"]):
            dead = int(self.store.get("dead"))
        return None if dead == self.world.rank else dead

    def end(self, who: str, why: str) -> None:
        # The main thread may have noticed, or be leaving in order; the others may need rank 0's store.
        if self.stopped.wait(2 * BEAT if self.world.first else BEAT):
            return
        print(f"error: {gone(self.world, who, why)}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may wait in a collective that can't be interrupted

    def stop(self) -> None:
        self.stopped.set()
        if self.thread is not threading.current_thread():
            self.thread.join(2 * BEAT)


def from_first(world: World, make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on every rank; an InputError is raised on every rank."""
    if world.size == 1:
        return make()
    said: list[Any] = [None, None]
    if world.first:
        try:
            said[0] = make()
        except InputError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    if said[1] is not None:
        raise InputError(said[1])
    return said[0]


def all_reduce_max(*values: int) -> list[int]:
    """Return each value's maximum over the ranks; the hosts exchange them without waiting for a device."""
    if not dist.is_initialized():
        return list(values)
    shared = torch.tensor(values)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def everywhere(verdict: torch.Tensor) -> torch.Tensor:
    """Return whether a bool on the device is true on every rank; the host doesn't wait."""
    if not dist.is_initialized():
        return verdict
    shared = verdict.to(torch.int32)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return shared.bool()


def gathered(own: torch.Tensor) -> list[torch.Tensor]:
    """Gather a tensor of one shape from each rank, in the order of the ranks."""
    if not dist.is_initialized():
        return [own]
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own.contiguous())
    return everyone


def mean_over_ranks(figures: torch.Tensor) -> torch.Tensor:
    """Average each figure over the ranks, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(figures)
        figures = figures / dist.get_world_size()
    return figures


def broadcast_state(network: torch.nn.Module, buffers_alone: bool = False) -> None:
    """Copy rank 0's parameters and buffers to every rank."""
    if dist.is_initialized():
        tensors = list(network.buffers()) + ([] if buffers_alone else list(network.parameters()))
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)
