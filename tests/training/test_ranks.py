"""One run on several ranks: the same weights as on one, an end for all, and where ranks meet."""

import dataclasses
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvssl.latents.noise import keyed
from lvssl.losses.ntxent import ntxent
from lvssl.models import device as devices
from lvssl.models.backbone import build_backbone
from lvssl.models.network import LVNet
from lvssl.settings.pretrain import (
    PRESETS,
    EngineSettings,
    LatentSettings,
    ModelSettings,
    OptimiserSettings,
    PretrainSettings,
)
from lvssl.training import gradients
from lvssl.training.batchnorm import SyncedBatchNorm, frozen_running_statistics, synchronised
from lvssl.training.distributed import (
    DEAD_AFTER,
    Heartbeat,
    World,
    connected,
    everywhere,
    first_host,
    from_first,
    world_of,
)
from lvssl.training.prepare import prepared
from lvssl.training.pretrain import calibrate
from lvssl.training.trainer import Trainer
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.loader import LoaderSettings, TwoViewLoader

TIMEOUT = 400  # seconds, on a machine with other work; a hang is a failure
FAMILIES = ("none", "sign", "gaussian", "bernoulli")
OPTIMISERS = {"adamw": 2e-3, "sgd": 0.1, "lars": 1.0}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def settings(
    data: Path,
    family: str,
    optimiser: str,
    lr: float = 0.0,
    projector_norm: bool = False,
    objective: str = "ntxent",
    **engine,
) -> PretrainSettings:
    """Five steps of 100 images."""
    base, lr = PRESETS["digits"], lr or OPTIMISERS[optimiser]
    return dataclasses.replace(
        base,
        data=data,
        epochs=1,
        batch_size=100,
        threads=1,
        workers=1,
        log_every=1,
        model=dataclasses.replace(base.model, projector_norm=projector_norm),
        latent=dataclasses.replace(base.latent, family=family, objective=objective, beta=1e-3),
        optimiser=OptimiserSettings(optimiser=optimiser, lr=lr, warmup_epochs=0.5),
        engine=EngineSettings(**engine),
    )


RUNS = {f"{family}, sgd": {"family": family, "optimiser": "sgd"} for family in FAMILIES}
RUNS |= {f"bernoulli, {name}": {"family": "bernoulli", "optimiser": name} for name in ("adamw", "lars")}
RUNS |= {"scaled output": {"family": "none", "optimiser": "sgd", "projector_norm": True}}
RUNS |= {"vicreg": {"family": "bernoulli", "optimiser": "sgd", "lr": 0.01, "objective": "vicreg"}}
RUNS |= {"average, chunk": {"family": "none", "optimiser": "sgd", "ema": 0.5, "chunk": 100}}
# In fp32 two orders of summation drift apart, and at the rates above past 1e-4 within five steps of 256
# images: by 7e-3 (sgd), 6e-3 (adamw), 3e-2 (lars). One rank drifts as far (2e-3, 6e-3, 1e-2) from itself
# when its batch comes in another order, so it is rounding that the steps amplify. A small part of the rate
# amplifies little. Not adamw: its first steps are lr * sign(g) whatever g's size, so a gradient that is all
# rounding takes a whole step to one side or the other. Not a family that draws: a bit that rounding flips
# is no rounding any more.
RUNS_FP32 = {
    f"{name}, {lr}": {"family": "none", "optimiser": name, "lr": lr}
    for name, lr in (("sgd", 2e-3), ("lars", 1e-2))
}


def trained(
    world: World, data: Path, run: dict[str, Any], dtype: torch.dtype = torch.float64, shuffled: bool = False
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and figures after five steps; in fp64 roundings stay too small to grow."""
    chosen = settings(data, **run)  # two ranks' chunks together are one rank's
    engine = dataclasses.replace(chosen.engine, chunk=chosen.engine.chunk // world.size)
    chosen = dataclasses.replace(chosen, engine=engine)
    place = {"rank": world.rank, "ranks": world.size}
    with TwoViewLoader(
        open_reader(data), chosen.view, LoaderSettings(chosen.batch_size, workers=1, **place)
    ) as loader:
        trainer = Trainer(chosen, 10, loader, torch.device("cpu"), world)
        trainer.network.to(dtype).train()
        if trainer.ema:
            trainer.ema.module.to(dtype)
        rows = []
        for batch in loader:
            order = torch.randperm(len(batch.labels)) if shuffled else slice(None)
            views, labels = batch.views[:, order].to(dtype), batch.labels[order]
            figures = step_without_agreeing(trainer, dataclasses.replace(batch, views=views, labels=labels))
            trainer.step += 1
            rows.append(trainer.row(figures))
        return (trainer.ema.module if trainer.ema else trainer.network).state_dict(), rows


def calibrated(world: World, data: Path) -> list[Tensor]:
    """Mean and variance at which the code's thresholds lie."""
    chosen, source = settings(data, "bernoulli", "sgd"), open_reader(data)
    reading = LoaderSettings(chosen.batch_size, workers=1, rank=world.rank, ranks=world.size)
    with TwoViewLoader(source, chosen.view, reading) as loader:
        trainer = Trainer(chosen, 10, loader, torch.device("cpu"), world)
        trainer.save = lambda: None
        calibrate(trainer, source)
    return [trainer.network.head.running(name) for name in ("mean", "var")]


def step_without_agreeing(trainer: Trainer, batch: Any) -> dict[str, Tensor]:
    """A step; the hosts exchange nothing to find that their parts are equal."""
    gather = dist.all_gather

    def watched(everyone: list[Tensor], own: Tensor, *rest: Any, **more: Any) -> Any:
        assert own.dtype != torch.uint8 or own.ndim > 1, "an exchange of arguments"
        return gather(everyone, own, *rest, **more)

    dist.all_gather = watched
    try:
        return trainer.train_step(batch)
    finally:
        dist.all_gather = gather


def rank_of(rank: int, size: int, port: int, digits: dict[str, Path], folder: Path) -> None:
    """All that one rank does. It trains on the smaller set."""
    torch.set_num_threads(1)
    gradients.BUCKET = 100_000  # several, of the smallest network
    world = World(rank, size, rank, "127.0.0.1", port)
    with connected(world, torch.device("cpu")):
        data = digits["test"]
        found = {name: trained(world, data, run, torch.float32) for name, run in RUNS_FP32.items()}
        if size == 1:
            again = {name: trained(world, data, run, torch.float32, True) for name, run in RUNS_FP32.items()}
            found |= {f"{name}, shuffled": result for name, result in again.items()}
        found["calibrated"] = calibrated(world, digits["train"])
        half = normalised(rank, size, dtype=torch.bfloat16)
        torch.Tensor.float = torch.Tensor.double  # what casts to fp32 by itself: heads, losses
        found |= {name: trained(world, data, run) for name, run in RUNS.items()}
        if size > 1:
            found |= {"averaged": averaged(rank), "late": late(rank), "verdicts": verdicts(rank)}
            found |= {"traffic": traffic(), "refused": refused(world)}
            found |= {"apart": trained(world, data, RUNS["none, sgd"] | {"sync_batch_norm": False})}
        normalisations = [normalised(rank, size), normalised(rank, size, frozen=True)]
        torch.save((found, *normalisations, half), folder / f"{rank}-of-{size}.pt")


def averaged(rank: int) -> dict[str, Any]:
    """Gradients in one piece and through the cache, averaged on the way and by hand: which differ; how many
    buckets there are, and were on their way when the backward pass ended."""
    images = torch.randn(32, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))

    def of(chunk: int, by_hand: bool) -> tuple[dict[str, Tensor], int, int]:
        torch.manual_seed(0)
        net = LVNet(ModelSettings("tiny", 32, 16), LatentSettings("none"), 8).double()
        averaging = gradients.GradientAllReducer([] if by_hand else net.parameters())
        gradients.backward(
            net.backbone,
            images,
            lambda h: ntxent(net.heads(h, keyed(0, len(h))).projections),
            nullcontext,
            chunk,
            averaging=averaging,
        )
        early = len(averaging.sent)
        averaging.finish()
        for p in net.parameters() if by_hand else ():
            dist.all_reduce(p.grad)
            p.grad /= 2
        return {n: p.grad for n, p in net.named_parameters()}, len(averaging.buckets), early

    found = {}
    for chunk in (0, 8):
        (expected, *_), (means, buckets, early) = of(chunk, True), of(chunk, False)
        found[chunk] = [n for n, g in expected.items() if not torch.equal(g, means[n])], buckets, early
    return found


def late(rank: int) -> list[float]:
    """A parameter that rank 1 alone uses, beside one that both use, and one that nobody uses: their means."""
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    averaging = gradients.GradientAllReducer(parameters)
    for _ in range(2):  # and again, from the beginning
        for parameter in parameters:
            parameter.grad = None
        (parameters[0] * (rank + 1) + (parameters[1] * 8 if rank else 0)).sum().backward()
        averaging.finish()
    return [parameter.grad.item() for parameter in parameters]


def verdicts(rank: int) -> list[bool]:
    """What all ranks say, of what each found: both, neither, and either alone."""
    own = (True, False, rank == 0, rank == 1)
    return [bool(everywhere(torch.tensor(verdict))) for verdict in own]


def refused(world: World) -> str:
    """What this rank hears of a mistake that rank 0 finds."""

    def make() -> None:
        assert world.first
        raise InputError("no such folder")

    with pytest.raises(InputError) as error:
        from_first(world, make)
    return str(error.value)


def normalised(
    rank: int, size: int, device: str = "cpu", dtype: torch.dtype = torch.float64, frozen: bool = False
) -> dict[str, torch.Tensor]:
    """Output, running statistics and gradients of synchronised normalisation; unequal batches. `frozen`: with
    running statistics that stay, as of images that a chunk or a recomputed block sees again."""
    x = torch.randn(7, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x * torch.arange(1, 8)[:, None, None, None] + 5  # another mean and spread on each rank
    x = x if size == 1 else x[:2] if rank == 0 else x[2:]
    x = x.to(device, dtype)
    norm = torch.nn.BatchNorm2d(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weight = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    norm.load_state_dict({"weight": weight}, strict=False)  # in fp32 the generator would draw others
    norm = synchronised(torch.nn.Sequential(norm))[0]
    assert isinstance(norm.to(device), SyncedBatchNorm)
    x.requires_grad_()
    with frozen_running_statistics(norm) if frozen else nullcontext():
        output = norm(x)
    (output.double().sin() * output.double().exp()).sum().backward()
    shared = torch.stack([norm.weight.grad, norm.bias.grad])
    if size > 1:
        dist.all_reduce(shared)
    found = {"output": output.detach(), "input gradient": x.grad, "weight gradients": shared}
    assert not any(buffer.requires_grad for buffer in norm.buffers()), "each step's graph would be kept"
    found |= {"mean": norm.running_mean, "variance": norm.running_var}
    return {name: value.cpu() for name, value in found.items()}


class Bytes(TorchDispatchMode):
    """Counts the bytes of all that operations read and write; views of memory do neither."""

    VIEWS = frozenset({"alias", "detach", "expand", "select", "unbind", "view"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        if operation.overloadpacket.__name__ not in self.VIEWS:
            self.count += sum(x.nbytes for x in tree_leaves((args, kwargs, made)) if isinstance(x, Tensor))
        return made


def traffic() -> float:
    """Bytes that synchronised normalisation moves for each number of a layer's input in bf16, both ways."""
    norm = synchronised(torch.nn.Sequential(torch.nn.BatchNorm2d(8)))
    x = torch.ones(16, 8, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.ones_like(x)
    with Bytes() as moved:
        torch.autograd.grad(norm(x), [x, *norm.parameters()], slope)
    return moved.count / x.numel()


@pytest.fixture(scope="module")
def found(digits, tmp_path_factory) -> dict[tuple[int, int], Any]:
    """What each rank found: (0, 1) alone, (0, 2) and (1, 2) as two."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.set_forkserver_preload(["lvssl.training.trainer"])
    contexts = [
        mp.start_processes(
            rank_of, (size, free_port(), digits, folder), size, join=False, start_method="forkserver"
        )
        for size in (1, 2)
    ]
    end = time.monotonic() + TIMEOUT
    for context in contexts:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                pytest.fail(f"ranks still running after {TIMEOUT} s")
    places = [(0, 1), (0, 2), (1, 2)]
    return {(rank, size): torch.load(folder / f"{rank}-of-{size}.pt") for rank, size in places}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_end_with_the_weights_of_one(found, name):
    """Weights, running statistics and every figure of five steps: each term of the loss is weighed right."""
    one, rows = found[0, 1][0][name]
    for rank in (0, 1):
        two, same = found[rank, 2][0][name]
        for key, expected in one.items():
            wrong = (two[key] - expected).abs().max().item()
            assert wrong <= 1e-7, f"rank {rank}, {key}: off by {wrong}"
        assert len(rows) == len(same) == 5
        for step, (wanted, got) in enumerate(zip(rows, same)):
            assert got == pytest.approx(wanted, rel=1e-5), f"rank {rank}, step {step}"


@pytest.mark.parametrize("name", RUNS_FP32)
def test_in_fp32_two_ranks_are_one_to_the_rounding(found, name):
    """To 1e-4 where the weights moved by ten times as much and more; and so are two orders of one batch."""
    (one, _), (two, _) = found[0, 1][0][name], found[0, 2][0][name]
    (shuffled, _), (other, _) = found[0, 1][0][f"{name}, shuffled"], found[1, 2][0][name]
    torch.manual_seed(0)
    first = LVNet(PRESETS["digits"].model, LatentSettings("none"), 8, 10).state_dict()
    weights = [key for key, value in one.items() if value.is_floating_point() and "running" not in key]
    moved = max((one[key] - first[key]).abs().max().item() for key in weights)
    for run in (two, other, shuffled):
        wrong = {key: (run[key] - one[key]).abs().max().item() for key in weights}
        worst = max(wrong, key=wrong.get)
        assert wrong[worst] <= 1e-4 < 0.1 * moved, f"{worst}: off by {wrong[worst]}, moved by {moved}"
    assert all(torch.equal(two[key], other[key]) for key in weights)


@pytest.mark.parametrize("chunk", [0, 8])
def test_gradients_are_averaged_while_the_backward_walk_goes_on(found, chunk):
    for rank in (0, 1):
        differing, buckets, early = found[rank, 2][0]["averaged"][chunk]
        assert differing == [] and early == buckets > 3, (rank, buckets, early)


def test_a_gradient_that_a_rank_does_not_have_is_zero_there(found):
    assert found[0, 2][0]["late"] == found[1, 2][0]["late"] == [1.5, 4.0, 0.0]


def test_a_verdict_is_of_all_ranks(found):
    assert found[0, 2][0]["verdicts"] == found[1, 2][0]["verdicts"] == [True, False, False, False]


def test_what_rank_0_finds_wrong_is_an_error_on_all(found):
    assert found[0, 2][0]["refused"] == found[1, 2][0]["refused"] == "no such folder"


def test_ranks_that_normalise_apart_have_the_running_statistics_of_rank_0(found):
    (one, _), (other, _) = (found[rank, 2][0]["apart"] for rank in (0, 1))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_thresholds_are_those_of_all_ranks_images(found):
    """Two ranks leave one of 1,297 images out; half of them would move the mean of some bit by 0.05."""
    mean, variance = found[0, 1][0]["calibrated"]
    for rank in (0, 1):
        moved = (found[rank, 2][0]["calibrated"][0] - mean) / variance.sqrt()
        assert moved.abs().max() < 0.01


def test_normalisation_over_unequal_ranks_is_that_of_the_whole_batch(found):
    whole, parts = found[0, 1][1], [found[rank, 2][1] for rank in (0, 1)]
    for name in ("output", "input gradient"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name])
    for name in ("weight gradients", "mean", "variance"):
        for part in parts:
            torch.testing.assert_close(part[name], whole[name])


def test_in_half_precision_normalisation_is_the_same_to_its_roundings(found):
    whole, parts = found[0, 1][1], [found[rank, 2][3] for rank in (0, 1)]
    joined = torch.cat([part["output"] for part in parts]).double()
    torch.testing.assert_close(joined, whole["output"], rtol=0.1, atol=0.1)


def test_normalisation_writes_no_wide_copies_of_what_it_reads(found):
    """Plain operations on fp32 copies moved 104 bytes for each number, which on a GPU is their time."""
    assert found[0, 2][0]["traffic"] < 40


def test_frozen_it_normalises_over_the_ranks_and_leaves_its_statistics(found):
    """As `--chunk` and `--recompute` see their images again: the layer then counts no batches, which torch's
    own asserts that it does."""
    whole, parts = found[0, 1][1], [found[rank, 2][2] for rank in (0, 1)]
    for name in ("output", "input gradient"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name])
    for part in parts:
        assert not part["mean"].any() and (part["variance"] == 1).all()


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_gpu_gets_the_same_synchronised_normalisation(monkeypatch, kind):
    """Not torch's, whose mask over the ranks' counts makes the host wait at each layer."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(devices, "OLDEST_TRITON", (0, 0))  # nothing is compiled here
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    network = prepared(build_backbone("resnet18", 32)[0], EngineSettings(), torch.device(kind), ranks=2)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision("highest")
    layers = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(layers) == 20 and all(type(layer) is SyncedBatchNorm for layer in layers)


def on_one_gpu(rank: int, port: int, folder: Path) -> None:
    """Two gloo ranks share a GPU: NCCL wants one each."""
    torch.cuda.set_device(0)
    with connected(World(rank, 2, rank, "127.0.0.1", port), torch.device("cpu")):
        found = {}
        for dtype in (torch.float64, torch.bfloat16):
            for frozen in (False, True):
                normalised(rank, 2, "cuda", dtype, frozen)  # what a first call sets up may wait
                found[dtype, frozen] = normalised(rank, 2, "cuda", dtype, frozen)
        torch.save(found, folder / f"{rank}.pt")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_ranks_on_one_gpu_normalise_as_on_a_cpu(found, tmp_path):
    mp.start_processes(on_one_gpu, (free_port(), tmp_path), 2, start_method="spawn")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for (dtype, frozen), tolerance in zip(parts[0], (1e-9, 1e-9, 0.1, 0.1)):
        whole = found[0, 1][2 if frozen else 1]
        for name in ("output", "mean", "variance"):
            mine = [part[dtype, frozen][name].double() for part in parts]
            joined = torch.cat(mine) if name == "output" else mine[0]
            torch.testing.assert_close(joined, whole[name].double(), rtol=tolerance, atol=tolerance)
        if dtype == torch.float64:  # in bf16 exp(output) makes the gradients too large for a tolerance
            slopes = torch.cat([part[dtype, frozen]["input gradient"] for part in parts])
            torch.testing.assert_close(slopes, whole["input gradient"], rtol=1e-9, atol=1e-9)
            for part in parts:
                torch.testing.assert_close(part[dtype, frozen]["weight gradients"], whole["weight gradients"])


def compiled(rank: int, port: int, folder: Path) -> None:
    """Gradients and running statistics after three steps, eager and compiled; the same of a layer in bf16."""
    torch.set_num_threads(1)
    with connected(World(rank, 2, rank, "127.0.0.1", port), torch.device("cpu")):
        found = []
        for compile in (False, True):
            torch.manual_seed(0)
            net = synchronised(build_backbone("tiny", 8)[0])
            if compile:
                net.compile()
            noise = torch.Generator().manual_seed(rank)
            for _ in range(3):  # the running statistics of the first must not hang on its graph
                net.zero_grad()
                net(torch.randn(16, 3, 8, 8, generator=noise)).square().sum().backward()
            layer = synchronised(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
            if compile:
                layer.compile()
            images = (5 + torch.randn(16, 3, 8, 8, generator=noise)).bfloat16().requires_grad_()
            layer(images).float().sum().backward()
            nets = net, layer
            found.append([x for net in nets for x in (*(p.grad for p in net.parameters()), *net.buffers())])
        torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
def test_synchronised_normalisation_compiles(tmp_path):
    mp.start_processes(compiled, (free_port(), tmp_path), 2, start_method="spawn")
    for rank in (0, 1):
        for eager, other in zip(*torch.load(tmp_path / f"{rank}.pt")):
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-4)


# -- where ranks meet -----------------------------------------------------------------------------


def test_alone_under_torchrun_and_under_slurm():
    assert world_of({}) == World()
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29"}
    assert world_of(torchrun) == World(3, 8, 1, "a", 29)
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "n[07-09]"}
    job = {"SLURM_JOB_ID": "123", "ENVIRONMENT": "BATCH"}
    world = world_of(slurm | job | {"SLURM_STEP_ID": "0"})
    assert (world.rank, world.size, world.local_rank, world.host) == (5, 8, 1, "n07")
    assert 10_000 <= world.port < 30_000
    for other in ({"SLURM_JOB_ID": "124", "SLURM_STEP_ID": "0"}, {"SLURM_STEP_ID": "1"}):
        assert world.port != world_of(slurm | job | other).port
    some = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[08-09]"}  # of the job's nodes
    assert world_of(slurm | job | some).host == "n08"
    assert world_of(slurm | job) == World(), "the batch script itself is no rank"
    assert world_of(slurm | torchrun) == World(3, 8, 1, "a", 29), "torchrun within Slurm"


def test_variables_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="LOCAL_RANK is not set"):
        world_of({"RANK": "0", "WORLD_SIZE": "2"})
    torchrun = {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29"}
    with pytest.raises(InputError, match=r"rank 2 of 2: a rank must be in \[0, 2\)"):
        world_of(torchrun)
    with pytest.raises(InputError, match="MASTER_PORT must be a whole number, got 'x'"):
        world_of(torchrun | {"MASTER_PORT": "x"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[07-09,12],login", "gpu07"), ("a[3,5]-ib,b", "a3-ib"),
     ("r[1-2]n[04-08]", "r1n04"), ("c-[10],d", "c-10")],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_a_missing_rank_and_a_taken_port_name_host_port_and_rank():
    port = free_port()
    with pytest.raises(InputError, match=rf"rank 0 of 2.*rank 1 did not connect.*127.0.0.1:{port}"):
        with connected(World(0, 2, 0, "127.0.0.1", port), torch.device("cpu"), 0.005):
            pass
    with pytest.raises(InputError, match=rf"rank 1 of 2.*nobody answered.*127.0.0.1:{port}"):
        with connected(World(1, 2, 1, "127.0.0.1", port), torch.device("cpu"), 0.005):
            pass
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"can't listen at 127.0.0.1:{port}"):
            with connected(World(0, 2, 0, "127.0.0.1", port), torch.device("cpu"), 0.05):
                pass


# -- is everybody still there? --------------------------------------------------------------------


class Counting:
    """A store that counts what is asked of it."""

    def __init__(self) -> None:
        self.store, self.requests = dist.HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self.store, name)


def hearts(size: int, store: Counting) -> list[Heartbeat]:
    """Of all ranks, without their threads."""
    made = [object.__new__(Heartbeat) for _ in range(size)]
    for rank, heart in enumerate(made):
        heart.world, heart.store = World(rank, size, rank, "127.0.0.1", 1), store
    return made


def test_signs_of_life_cost_a_few_requests_a_rank():
    """512 ranks that each look at each would ask 500,000 times every five seconds."""
    asked = {}
    for size in (8, 64, 512):
        store = Counting()
        seen: list[dict] = [{} for _ in range(size)]
        for beat in range(2):
            for rank, heart in enumerate(hearts(size, store)):
                assert heart.silent(seen[rank], str(beat)) is None
        asked[size] = store.requests / 2 / size
    assert max(asked.values()) <= 6


@pytest.mark.parametrize("dead", [0, 2])
def test_every_rank_hears_of_one_that_is_silent(monkeypatch, dead):
    store, now = Counting(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    seen: list[dict] = [{} for _ in range(4)]
    heard = 10.0 if dead == 0 else 15.0  # rank 0 looks before the others give their signs
    for beat in range(13):
        now = 5.0 * beat
        found = {
            rank: heart.silent(seen[rank], str(beat))
            for rank, heart in enumerate(hearts(4, store))
            if not (rank == dead and beat > 2)
        }
        late = now - heard > DEAD_AFTER
        expected = dict.fromkeys(found, dead if late else None)
        assert found == expected, beat
