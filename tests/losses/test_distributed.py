"""Ranks over gloo against one process: loss and parameter gradients after DDP's averaging, planted bugs.

One set of processes for each number of ranks does all of it and writes down what it found. The data are
asymmetric (symmetric ones have hidden such bugs elsewhere), and batches differ from rank to rank.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lvssl.losses import anchors, distributed
from lvssl.losses import ntxent as module
from lvssl.losses.ntxent import ntxent, reference
from lvssl.losses.stochastic import sample_infonce
from lvssl.losses.variants import decoupled_ntxent, mc_infonce, vicreg

IMAGES = (5, 3, 60, 1)  # of each rank
TIMEOUT = 100  # seconds; a hang is a failure
BUGS = ("labels not offset", "gradient not gathered", "factor of world size")


def images_of(rank: int, count: int) -> tuple[Tensor, Tensor]:
    """Two views [count, 6], around another mean and with another spread on each rank."""
    noise = torch.Generator().manual_seed(rank)
    x = torch.randn(count, 6, generator=noise, dtype=torch.float64) * (1 + rank) + rank
    return x, x + 0.3 * torch.randn(count, 6, generator=noise, dtype=torch.float64)


class Model(nn.Module):
    """An encoder, and a temperature that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        self.log_temperature = nn.Parameter(torch.tensor(-1.5, dtype=torch.float64))

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(views), self.log_temperature.exp()


def samples(loss: Callable) -> Callable:
    return lambda u, tau: loss(torch.stack([u, u.roll(1, 1) + 0.1 * u]), tau)


def weighed_vicreg(u: Tensor, tau: Tensor) -> Tensor:
    invariance, variance, covariance = vicreg(u.tanh())  # of u alone, the last bias has no gradient
    return tau * (25 * invariance + 25 * variance + covariance)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "vicreg": weighed_vicreg,
    "ntxent": ntxent,
    "decoupled": decoupled_ntxent,
    "mc_infonce": samples(mc_infonce),
}


def gathered_ntxent(u: Tensor, temperature: Tensor, bug: str = "") -> Tensor:
    """As commonly written, for equal batches: gather all, cross-entropy of the own rows, DDP averages."""
    size, rank = dist.get_world_size(), dist.get_rank()
    everyone = [torch.empty_like(u) for _ in range(size)]
    dist.all_gather(everyone, u.detach())
    if bug != "gradient not gathered":
        everyone = list(_Gather.apply(u))
    else:
        everyone[rank] = u
    unit, own = (nn.functional.normalize(t, dim=1) for t in (torch.cat(everyone), u))
    offset = 0 if bug == "labels not offset" else rank * len(u)
    rows = torch.arange(len(u))
    logits = own @ unit.T / temperature
    logits = logits.masked_fill(torch.arange(len(unit)) == (rows + offset)[:, None], float("-inf"))
    loss = nn.functional.cross_entropy(logits, rows.roll(len(u) // 2) + offset)
    return loss * size if bug == "factor of world size" else loss


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> tuple[Tensor, ...]:
        everyone = [torch.empty_like(u) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, u)
        return tuple(everyone)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        summed = torch.stack(grads)
        dist.all_reduce(summed)
        return summed[dist.get_rank()]


def under_ddp(loss: Callable, rank: int, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Loss and parameter gradients of one step of this rank."""
    model = DistributedDataParallel(Model())
    value = loss(*model(torch.cat(images_of(rank, counts[rank]))))
    (2 * value).backward()
    return {"loss": value.detach()} | {name: p.grad for name, p in model.module.named_parameters()}


def in_one_process(loss: Callable, counts: tuple[int, ...]) -> dict[str, Tensor]:
    model = Model()
    first, second = zip(*(images_of(rank, count) for rank, count in enumerate(counts)))
    value = loss(*model(torch.cat([*first, *second])))
    (2 * value).backward()
    return {"loss": value.detach()} | {name: p.grad for name, p in model.named_parameters()}


def work(rank: int, size: int, folder: str) -> None:
    """All that one rank does; what it found goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    unequal, equal = IMAGES[:size], (4,) * size
    found: dict[str, Any] = {}
    for way, ring_from in (("gathered", 10**9), ("ring", 0)):
        distributed.RING_FROM = ring_from
        for name, loss in LOSSES.items():
            found[f"{name}, {way}"] = under_ddp(loss, rank, unequal)
        found[f"ntxent, {way}, a rank without images"] = under_ddp(ntxent, rank, (0, *unequal[1:], 4)[-size:])
        found[f"ntxent, {way}, cold"] = under_ddp(lambda u, tau: ntxent(u, 0.05 * tau), rank, unequal)
    found["oracle"] = under_ddp(gathered_ntxent, rank, equal)
    for bug in BUGS:
        found[f"oracle: {bug}"] = under_ddp(lambda u, tau, b=bug: gathered_ntxent(u, tau, b), rank, equal)
        found[f"ours: {bug}"] = with_bug(bug, lambda: under_ddp(ntxent, rank, unequal))
    found["samples"] = under_ddp(of_samples, rank, unequal)
    with distributed.equal_parts():
        found["equal parts"] = under_ddp(ntxent, rank, equal)
        found["equal parts, wrong"] = complaint_of(torch.zeros(3, 8))
    found["errors"] = errors(rank, size)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def of_samples(u: Tensor, tau: Tensor) -> Tensor:
    """Two samples a vector, against directions."""
    z = torch.nn.functional.normalize(torch.stack([u, u.roll(1, dims=1)]), dim=2)
    return sample_infonce(z, z.mean(0), 3.0) * tau


def complaint_of(vectors: Tensor) -> str:
    try:
        ntxent(vectors)
    except ValueError as error:
        return str(error)
    return "none"


def with_bug(bug: str, step: Callable) -> Any:
    """The step with one line of our own code put wrong."""
    kept = distributed.remote_blocks, distributed._Total.backward, anchors.chunked.log_sum_exp
    if bug == "gradient not gathered":  # what the other ranks' anchors make of our vectors is lost

        def remote_blocks(block, counts):
            for other in kept[0](block, counts):
                yield replace(other, weights=0 * other.weights) if hasattr(other, "weights") else other

        distributed.remote_blocks = remote_blocks
    elif bug == "factor of world size":
        distributed._Total.backward = staticmethod(lambda ctx, grad: grad)
    else:  # the anchor itself is looked for in another rank's place

        def log_sum_exp(rows, columns, excluded, bound):
            return kept[2](rows, columns, (1, -1) if dist.get_rank() and excluded else excluded, bound)

        anchors.chunked.log_sum_exp = log_sum_exp
    try:
        return step()
    finally:
        distributed.remote_blocks, distributed._Total.backward, anchors.chunked.log_sum_exp = kept


def errors(rank: int, size: int) -> dict[str, str]:
    """What each rank is told when the last one's arguments are wrong."""
    good, last = torch.ones(4, 8), rank == size - 1
    nan = torch.full((4, 8), float("nan"))
    cases: dict[str, tuple[Tensor, float]] = {
        "odd": (good[:3] if last else good, 0.1),
        "integers": (good.long() if last else good, 0.1),
        "tau": (good, -1.0 if last else 0.1),
        "d": (good[:, :5] if last else good, 0.1),
        "type": (good.half() if last else good, 0.1),
        "temperatures": (good, 0.2 if last else 0.1),
        "empty": (good[:0], 0.1),
        "nan": (nan if last else good, 0.1),
    }
    said = {}
    for name, arguments in cases.items():
        try:
            said[name] = f"no error: {ntxent(*arguments).item()}"
        except (ValueError, FloatingPointError) as error:
            said[name] = str(error)
    said["well again"] = f"{ntxent(torch.eye(4), 0.1).item():.6f}"
    return said


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def found(request, tmp_path_factory) -> list[dict[str, Any]]:
    """What each rank found, for 1 to 4 ranks."""
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    mp.set_forkserver_preload(["torch.distributed", "lvssl.losses.ntxent"])
    processes = mp.start_processes(work, (size, str(folder)), size, join=False, start_method="forkserver")
    end = time.monotonic() + TIMEOUT
    while not processes.join(timeout=1):  # returns when one of them ends, too
        if time.monotonic() > end:
            alive = [rank for rank, process in enumerate(processes.processes) if process.is_alive()]
            for process in processes.processes:
                process.kill()
            pytest.fail(f"ranks {alive} of {size} still running after {TIMEOUT} s")
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of loss and gradients, relative to the largest entry of each."""
    return max(((found[k] - v).abs().max() / v.abs().max()).item() for k, v in expected.items())


@pytest.mark.parametrize("way", ["gathered", "ring"])
def test_every_rank_has_the_loss_and_gradients_of_one_process(found, way):
    unequal = IMAGES[: len(found)]
    expected = {
        "ntxent, {}": in_one_process(reference, unequal),
        "ntxent, {}, a rank without images": in_one_process(reference, (0, *unequal[1:], 4)[-len(found) :]),
        "ntxent, {}, cold": in_one_process(lambda u, tau: reference(u, 0.05 * tau), unequal),
        "decoupled, {}": in_one_process(decoupled_ntxent, unequal),
        "mc_infonce, {}": in_one_process(samples(mc_infonce), unequal),
        "vicreg, {}": in_one_process(weighed_vicreg, unequal),
    }
    for name, wanted in expected.items():
        for rank, results in enumerate(found):
            assert error(results[name.format(way)], wanted) < 1e-9, f"{name.format(way)}, rank {rank}"


def test_samples_against_the_directions_of_all_ranks(found):
    """Parts of any size, their number told between the hosts; in fp32."""
    expected = in_one_process(of_samples, IMAGES[: len(found)])
    for results in found:
        assert error(results["samples"], expected) < 1e-5


def test_equal_parts_need_no_exchange(found):
    expected = in_one_process(reference, (4,) * len(found))
    for results in found:
        assert error(results["equal parts"], expected) < 1e-9
        assert results["equal parts, wrong"].startswith("projections must be [2B, d]"), "without a rank"


def test_the_oracle_agrees_where_it_can(found):
    """It returns the mean of its own anchors, so that its loss is right on average alone."""
    wanted = in_one_process(reference, (4,) * len(found))
    mean = sum(results["oracle"]["loss"] for results in found) / len(found)
    for results in found:
        assert error(results["oracle"] | {"loss": mean}, wanted) < 1e-9


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_seen(found, bug):
    if len(found) == 1:
        pytest.skip("a single rank hides them")
    wanted = in_one_process(reference, IMAGES[: len(found)])
    assert max(error(results[f"ours: {bug}"], wanted) for results in found) > 1e-3
    wanted = in_one_process(reference, (4,) * len(found))
    mean = sum(results[f"oracle: {bug}"]["loss"] for results in found) / len(found)
    assert max(error(results[f"oracle: {bug}"] | {"loss": mean}, wanted) for results in found) > 1e-3


def test_an_error_on_one_rank_is_told_on_every_rank(found):
    size = len(found)
    several, who = size > 1, f"rank {size - 1}: " if size > 1 else ""
    expected = {
        "odd": f"{who}projections must be [2B, d] with B >= 1: the first views, then the second; "
        "got shape (3, 8)",
        "integers": f"{who}projections must be floats, got torch.int64",
        "tau": f"{who}temperature must be positive and finite, got -1.0",
    }
    if several:
        expected |= {
            "d": f"projections: d must be the same on all ranks, got {[8] * (size - 1) + [5]}",
            "type": "projections: type must be the same on all ranks, got "
            f"{[torch.float32] * (size - 1) + [torch.float16]}",
            "temperatures": f"temperature must be the same on all ranks, got {[0.1] * (size - 1) + [0.2]}",
            "empty": "projections must be [2B, d] with B >= 1 on one rank at least, got none on any",
        }
    for rank, results in enumerate(found):
        said = results["errors"]
        assert {name: said[name] for name in expected} == expected, f"rank {rank}"
        count = 4 if rank == size - 1 else 0
        assert said["nan"].startswith("NT-Xent is nan; projections: ")
        assert f"{count} of 4 vectors are not finite" in said["nan"], f"rank {rank}"
        everyone = torch.eye(4).unflatten(0, (2, 2)).repeat(1, size, 1).flatten(0, 1)
        assert float(said["well again"]) == pytest.approx(reference(everyone, 0.1).item(), rel=1e-5)


def test_a_group_that_is_gone_is_not_used(tmp_path):
    """A process that has left its group computes on its own again."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    x = torch.randn(600, 8)
    inside = ntxent(x, 0.1)
    dist.destroy_process_group()
    assert distributed.ranks() == 1
    torch.testing.assert_close(ntxent(x, 0.1), inside)
    assert module.checked(x, 0.1) == [600]
