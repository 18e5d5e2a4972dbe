"""A step as a GPU takes it: what isn't finite leaves no trace, what it launches doesn't grow with the layers,
and nothing in it makes the host wait. The same bodies run on a CPU, where the trainer is told to go that way.
"""

import copy
import dataclasses
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from devices import GPU
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lvssl.latents import FAMILIES, noise
from lvssl.losses import anchors, ntxent, variants
from lvssl.models.device import DTYPES
from lvssl.models.network import LVNet
from lvssl.runs.labels import open_labelled
from lvssl.settings.pretrain import (
    PRESETS,
    EngineSettings,
    LatentSettings,
    ModelSettings,
    OptimiserSettings,
    PretrainSettings,
)
from lvssl.training import loop
from lvssl.training import trainer as trainer_module
from lvssl.training.distributed import World
from lvssl.training.gradients import clip_gradients
from lvssl.training.optimiser import build_optimiser, learning_rate, restore_optimiser
from lvssl.training.pretrain import calibrate
from lvssl.training.stopping import Stop
from lvssl.training.supervised import Classifier, Recipe, SupervisedTrainer
from lvssl.training.trainer import Trainer
from pipelines.augment import augmenter_for
from pipelines.decode import open_reader
from pipelines.loader import LoaderSettings, TwoViewLoader, ViewBatch

RATES = {"adamw": 2e-3, "sgd": 0.1, "lars": 1.0}
CLIP = 0.1  # below the norm of any step's gradients here


@pytest.fixture(autouse=True)
def nobody_looks(monkeypatch):
    """What is looked at on a CPU alone: a loss, for it to be finite; the temperature, in the chunked form;
    classes, by torch, for there to be so many."""
    for module in (ntxent, variants):
        monkeypatch.setattr(module, "finite", lambda loss, *_: loss)
    monkeypatch.setattr(anchors, "logit_bound", lambda _: 1 / PRESETS["digits"].temperature)
    monkeypatch.setattr(torch.nn.functional, "one_hot", one_hot)


def one_hot(classes: Tensor, count: int) -> Tensor:
    shape = (*classes.shape, count)
    return torch.zeros(shape, dtype=torch.int64, device=classes.device).scatter_(-1, classes[..., None], 1)


def settings(data: Path, out: Path, optimiser: str = "adamw", **changes: Any) -> PretrainSettings:
    shared: dict[str, Any] = {"log_every": 2, "threads": 1, "workers": 1}
    chosen = OptimiserSettings(optimiser, RATES[optimiser], warmup_epochs=0, clip=CLIP)
    return dataclasses.replace(
        PRESETS["digits"], data=data, out=out, optimiser=chosen, **{**shared, **changes}
    )


def trainer_and_batches(chosen: PretrainSettings, device: str, count: int) -> tuple[Trainer, list[ViewBatch]]:
    """A trainer that goes the way of a GPU, and its first batches."""
    kind = torch.device(device)
    with TwoViewLoader(
        open_reader(chosen.data),
        chosen.view,
        LoaderSettings(
            chosen.batch_size,
            workers=1,
            augmenter=augmenter_for(kind),
            device=kind,
        ),
    ) as loader:
        trainer = Trainer(chosen, 10, loader, kind, World(), host_reads=False)
        trainer.network.train()
        batches = iter(loader)
        return trainer, [next(batches) for _ in range(count)]


def step(trainer: Trainer, batch: ViewBatch) -> None:
    trainer.train_step(batch)
    trainer.step += 1


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, statistics, moments and counters, by name."""
    found = {f"network/{k}": v for k, v in trainer.network.state_dict().items()}
    if trainer.ema:
        found |= {f"average/{k}": v for k, v in trainer.ema.module.state_dict().items()}
    for number, moments in trainer.optimiser.state_dict()["state"].items():
        found |= {f"optimiser/{number}/{k}": v for k, v in moments.items()}
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    ("optimiser", "precision", "chunk"),
    [
        ("adamw", "fp32", 0),
        ("sgd", "bf16", 100),
        ("lars", "fp32", 0),
        pytest.param("lars", "fp16", 100, marks=pytest.mark.slow),
        pytest.param("adamw", "fp16", 0, marks=pytest.mark.slow),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(digits, tmp_path, device, optimiser, precision, chunk):
    """Not the first, where there are no moments yet, nor a later one; and the run goes on, in chunks, by
    recomputed blocks, in the precision and with the gradients' norm that were asked for."""
    engine = EngineSettings(ema=0.9, precision=precision, chunk=chunk, recompute=optimiser == "lars")
    trainer, batches = trainer_and_batches(
        settings(digits["train"], tmp_path, optimiser, engine=engine), device, 5
    )
    backbone, seen, inner = trainer.network.backbone, [], []
    backbone.register_forward_hook(lambda _, given, made: seen.append((len(given[0]), made.dtype)))
    backbone[3].conv1.register_forward_hook(lambda *_: inner.append(1))
    for number, batch in enumerate(batches):
        bad = number in (0, 3)
        if bad:
            batch = dataclasses.replace(batch, views=batch.views * float("nan"))
        before = everything(trainer)
        step(trainer, batch)
        after = everything(trainer)
        changed = [name for name in after if name not in before or not torch.equal(before[name], after[name])]
        # AdamW makes its moments at the first step: nothing but zeros, with a counter of 0.
        begun = [n for n in changed if n not in before and n.startswith("optimiser") and not after[n].any()]
        assert (changed == begun) is bad, changed
        assert all(value.isfinite().all() for value in after.values())
        assert {name.split("/")[0] for name in changed} == {"network", "average", "optimiser"} or bad
        if device == "cuda":
            torch.cuda.synchronize()
        assert trainer.finite.in_a_row() == bad
        norm = clip_gradients(trainer.parameters).item()  # LARS adapts gradients in place
        assert bad or optimiser == "lars" or norm == pytest.approx(CLIP, rel=1e-4)
    parts = 3 if chunk else 1
    assert len(seen) == len(batches) * (2 * parts if chunk else 1)
    assert max(images for images, _ in seen) == -(-2 * trainer.settings.batch_size // parts)
    assert {dtype for _, dtype in seen} == {DTYPES[precision]}
    assert len(inner) - len(seen) == len(batches) * parts * engine.recompute


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_gradients_that_no_loss_scale_makes_finite_end_a_run(digits, tmp_path, device):
    """In fp16 those that overflow are a part of the search for a scale, and no failure, as a loss that isn't
    finite is; but it has an end. A resumed run goes on with the scale that was found."""
    engine = EngineSettings(precision="fp16")
    trainer, (batch,) = trainer_and_batches(settings(digits["train"], tmp_path, engine=engine), device, 1)
    trainer.parameters[0].register_hook(lambda grad: grad * float("inf"))
    trainer.scaler = torch.amp.GradScaler(device, init_scale=8.0)
    step(trainer, dataclasses.replace(batch, views=batch.views * float("nan")))
    if device == "cuda":
        torch.cuda.synchronize()
    assert trainer.finite.in_a_row() == 1 and trainer.scaler.get_scale() == 4
    with pytest.raises(FloatingPointError, match="the last of 3 in a row: the gradient is not finite"):
        for number in range(8):
            step(trainer, batch)
            if device == "cuda":
                torch.cuda.synchronize()
            assert trainer.finite.in_a_row() == max(0, number - 1)
            trainer.between_steps(Stop())
    assert trainer.step == 6
    resumed, _ = trainer_and_batches(trainer.settings, device, 0)
    resumed.load_state(trainer.state())
    assert resumed.scaler.state_dict() == trainer.scaler.state_dict()


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "lars"])
def test_both_ways_are_one_training(digits, tmp_path, monkeypatch, optimiser):
    """With the host looking and without: the same weights, in fp64, where roundings stay small."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # of heads and losses
    chosen = settings(digits["train"], tmp_path, optimiser, engine=EngineSettings(ema=0.8), seed=5)
    chosen = dataclasses.replace(chosen, latent=LatentSettings("none"))
    one, batches = trainer_and_batches(chosen, "cpu", 4)
    torch.manual_seed(5)
    for first, weight in zip(LVNet(chosen.model, chosen.latent, 8).parameters(), one.network.parameters()):
        assert torch.equal(first, weight)
    other = Trainer(chosen, 10, one.loader, torch.device("cpu"), World(), host_reads=True)
    found = []
    for trainer in (one, other):
        trainer.network.double().train()
        trainer.ema.module.double()
        for moments in trainer.optimiser.state.values():
            moments["momentum_buffer"] = moments["momentum_buffer"].double()
        for batch in batches:
            step(trainer, dataclasses.replace(batch, views=batch.views.double()))
        found.append(everything(trainer))
        assert trainer.key.item() == noise.key_of(5, 3)
    weights = [name for name in found[1] if name.startswith(("network", "average"))]
    for name in weights:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("fused", [True, False])
def test_an_optimisers_state_goes_from_device_to_device(optimiser, fused):
    """A checkpoint of a GPU goes on on a CPU, and the other way: each with its own options."""

    def made(fused: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)).double()
        return net, build_optimiser(net, OptimiserSettings(optimiser, 0.1, weight_decay=0.01), fused)

    def go(net: torch.nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        optimiser.zero_grad()
        net(x).square().sum().backward()
        optimiser.step()

    (net, first), (other, second) = made(fused), made(not fused)
    for seed in range(3):
        go(net, first, seed)
    other.load_state_dict(net.state_dict())
    options = [{k: v for k, v in group.items() if k != "params"} for group in second.param_groups]
    restore_optimiser(second, copy.deepcopy(first.state_dict()))
    assert options == [{k: v for k, v in group.items() if k != "params"} for group in second.param_groups]
    for seed in range(3, 6):
        go(net, first, seed)
        go(other, second, seed)
    for a, b in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "lars"])
def test_moments_lie_as_the_weights_do(optimiser):
    """A run that goes on with another --channels-last; fused kernels refuse moments of another layout, or
    take their numbers for other ones."""

    def made(layout: torch.memory_format, fused: bool) -> torch.optim.Optimizer:
        torch.manual_seed(0)
        net = torch.nn.Conv2d(3, 4, 3, bias=False).to(memory_format=layout)
        made = build_optimiser(net, OptimiserSettings(optimiser, 0.1), fused)
        net.weight.grad = torch.randn_like(net.weight)
        made.step()
        return made

    first, second = made(torch.contiguous_format, False), made(torch.channels_last, True)
    restore_optimiser(second, copy.deepcopy(first.state_dict()))
    (weight, moments), (_, expected) = (next(iter(o.state.items())) for o in (second, first))
    assert weight.is_contiguous(memory_format=torch.channels_last) and moments.keys() == expected.keys()
    for name, value in moments.items():
        assert torch.equal(value, expected[name])
        assert not value.dim() or value.stride() == weight.stride(), name


def test_a_compiled_backbone_calibrates_as_it_is_loaded(digits, tmp_path):
    """Eagerly: for two shapes of batches in eval mode a compiler would take longer than the images do."""
    trainer, _ = trainer_and_batches(settings(digits["train"], tmp_path), "cpu", 0)
    compiled = []
    trainer.network.backbone.compile(backend=lambda graph, _: compiled.append(graph) or graph.forward)
    calibrate(trainer, open_reader(digits["train"]))
    assert trainer.calibrated and not compiled
    trainer.network.features(torch.zeros(2, 3, 8, 8))
    assert compiled


# -- launches -------------------------------------------------------------------------------------

LAUNCH_NOTHING = {  # views of memory, and marks for a profiler
    "_record_function_enter_new", "_record_function_exit",
    "alias", "as_strided", "detach", "expand", "select", "slice", "split", "split_with_sizes", "t",
    "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "permute",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """The operations that would launch something, by name; one over many tensors counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name not in LAUNCH_NOTHING:
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def operations_beside_the_network(backbone: str, optimiser: str, ema: float) -> list[str]:
    """What statistics, norm, clipping, optimiser, verdict and average do in the third step of a network."""
    chosen = PretrainSettings(
        model=ModelSettings(backbone, 32, 16),
        optimiser=OptimiserSettings(optimiser, RATES[optimiser], clip=1.0),
        engine=EngineSettings(ema=ema),
        view=dataclasses.replace(PRESETS["cifar10-r18"].view),
    )
    trainer = Trainer(chosen, 10, [None] * 10, torch.device("cpu"), World(), host_reads=False)
    generator, loss, indices = torch.Generator().manual_seed(0), torch.ones(()), torch.zeros(1)
    for _ in range(3):
        for parameter in trainer.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(
                memory_format=torch.preserve_format
            )
        with Operations() as seen:
            trainer.finite.keep()
            finite = trainer.update(loss)
            trainer.settle(finite)
            trainer.finite.see(finite, indices)
    return seen.names


@pytest.mark.parametrize(("optimiser", "ema"), [("adamw", 0.9), ("sgd", 0.9), ("lars", 0.9), ("sgd", 0.0)])
def test_what_a_step_adds_does_not_grow_with_the_layers(optimiser, ema):
    small, large = (operations_beside_the_network(name, optimiser, ema) for name in ("tiny", "resnet18"))
    assert small == large
    assert len(small) < 60, small


# -- host waits -----------------------------------------------------------------------------------

# They need a number, or how many there are, on the host; `lift_fresh` brings one of the host's, from memory
# that isn't pinned, which waits as well.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "lift_fresh",
    "unique_dim",
    "_unique2",
}


class NoWaits(TorchDispatchMode):
    """Raises where an operation would make the host wait for a GPU."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        masked = name in ("index", "index_put_", "index_put") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        assert name not in WAITS and not masked, f"{name} of a mask" if masked else name
        return operation(*args, **(kwargs or {}))


CASES: dict[str, dict[str, Any]] = {
    family: {"latent": LatentSettings(family, beta=1e-3, decorrelation=0.1)}
    for family in (*FAMILIES, "gaussian+bernoulli")
}
CASES |= {
    f"{family}, {name}": {"latent": LatentSettings(family, objective=name, **more)}
    for name, family, more in (
        ("dcl", "bernoulli", {}),
        ("vicreg", "bernoulli", {}),
        ("mcinfonce", "gaussian", {"sample_reduction": "losses"}),
        ("hib", "gaussian", {}),
        ("ceb", "vmf", {"site": "proj"}),
        ("ceb", "power_spherical", {"site": "proj"}),
        ("ntxent", "bernoulli", {"sample_reduction": "losses", "estimator": "relaxed"}),
        ("ntxent", "categorical", {"sample_reduction": "projections", "init_scale_start": 1.0}),
    )
}
CASES |= {
    f"bernoulli, {name}": {"engine": EngineSettings(precision=name, ema=0.9)} for name in ("bf16", "fp16")
}
CASES |= {
    "recompute": {"engine": EngineSettings(recompute=True)},
    "chunk": {"engine": EngineSettings(chunk=100)},
}


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "fp16" in name else name for name in CASES]
)
def test_no_step_waits_for_the_device(digits, tmp_path, monkeypatch, device, name):
    """On a GPU, torch makes any synchronisation an error; on a CPU, what would synchronise is forbidden by
    name. Every family, objective and precision; in a step whose figures are logged, and in one without."""
    monkeypatch.setattr(noise, "on_cpu", lambda tensor: False)  # draw as on a GPU
    trainer, batches = trainer_and_batches(settings(digits["train"], tmp_path, **CASES[name]), device, 4)
    for number, batch in enumerate(batches):
        if number < 2:  # once it is warm: kernels compiled, constants on the device
            step(trainer, batch)
        elif device == "cpu":
            with NoWaits():
                step(trainer, batch)
        else:
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(trainer, batch)
                trainer.finite.in_a_row()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    ("name", "optimiser"),
    [
        ("bernoulli", "adamw"),
        *(pytest.param("bernoulli", name, marks=pytest.mark.slow) for name in ("sgd", "lars")),
        *(
            pytest.param(name, "adamw", marks=pytest.mark.slow)
            for name in sorted(CASES.keys() - {"bernoulli", "bernoulli, fp16", "recompute", "chunk"})
        ),
    ],
)
def test_a_recorded_training_is_the_same(digits, tmp_path, monkeypatch, device, optimiser, name):
    """On a CPU to the bit, if the learning rate, which a recording reads from a tensor, is a fp32 number. The
    rate's weight is constant from the third step on; what is annealed changes at each, and isn't recorded."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(trainer_module, "learning_rate", lambda *_: float(np.float32(learning_rate(*_))))
    runs = []
    for graph in ("off", "on"):
        chosen = settings(digits["train"], tmp_path, optimiser, epochs=1, log_every=4, **CASES[name])
        latent = dataclasses.replace(chosen.latent, beta_warmup=0.2)
        chosen = dataclasses.replace(
            chosen, latent=latent, engine=dataclasses.replace(chosen.engine, graph=graph)
        )
        trainer, batches = trainer_and_batches(chosen, device, 10)
        for batch in batches:
            step(trainer, batch)
        assert (trainer.recorded is not None) is (graph == "on")
        if trainer.recorded is not None:
            annealed = latent.init_scale_start is not None or latent.relaxation_start is not None
            assert annealed or set(trainer.recorded.replays) == {False, True}
        runs.append(everything(trainer))
    differing = [
        name
        for name, value in runs[0].items()
        if not torch.allclose(value, runs[1][name], *((0, 0) if device == "cpu" else (1e-2, 1e-3)))
    ]
    assert not differing


@pytest.mark.parametrize(
    ("annealed", "more"),
    [
        (False, {}),
        (False, {"estimator": "relaxed"}),
        (True, {"estimator": "relaxed", "relaxation_start": 2.0}),
        (True, {"init_scale_start": 1.0}),
        (True, {"beta": 1e-3, "beta_schedule": "warmup"}),
    ],
)
def test_only_what_is_annealed_puts_a_recording_off(digits, tmp_path, annealed, more):
    latent = LatentSettings("bernoulli", **{"beta_schedule": "constant", **more})
    trainer, _ = trainer_and_batches(settings(digits["train"], tmp_path, latent=latent), "cpu", 0)
    first = trainer.constants()
    trainer.step = 1
    assert (trainer.constants() != first) is annealed


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    "optimiser", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "lars"))]
)
def test_a_recorded_training_is_resumed(digits, tmp_path, monkeypatch, device, optimiser):
    """From a checkpoint's state, to the weights of the undisturbed one."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    latent = LatentSettings("bernoulli", beta_schedule="constant")
    more = {"epochs": 1, "log_every": 4, "latent": latent, "engine": EngineSettings(graph="on")}
    chosen = settings(digits["train"], tmp_path, optimiser, **more)
    whole, batches = trainer_and_batches(chosen, device, 10)
    for number, batch in enumerate(batches):
        if number == 5:
            state = copy.deepcopy(whole.state())
        step(whole, batch)
    resumed, batches = trainer_and_batches(chosen, device, 10)
    resumed.load_state(state)
    resumed.step = state["step"]
    for batch in batches[5:]:
        step(resumed, batch)
    assert resumed.step == 10 and float(resumed.optimiser.param_groups[0]["lr"]) > 0
    first, second = everything(whole), everything(resumed)
    close = (0, 0) if device == "cpu" else (1e-2, 1e-3)
    assert [name for name, value in first.items() if not torch.allclose(value, second[name], *close)] == []


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("on", "frozen"), [("features", True), ("features", False), ("latent", False)])
def test_no_step_with_labels_waits(digits, tmp_path, device, on, frozen):
    """Of the linear evaluation and of fine-tuning."""
    train, kind = open_labelled(digits["train"]), torch.device(device)
    network = LVNet(PRESETS["digits"].model, LatentSettings("gaussian"), 8).to(kind)
    model = Classifier(network, on, train, frozen, seed=0)
    recipe = Recipe(1, 128, 0.1, 1e-4, 0, 10.0, 1, 1)
    training = SupervisedTrainer(
        tmp_path, model, train, PRESETS["digits"].view, recipe, kind, host_reads=False
    )
    with training.loader as loader:
        batches = iter(loader)
        for number, batch in enumerate(next(batches) for _ in range(4)):
            if number < 2:
                training.train_step(batch)
            elif device == "cpu":
                with NoWaits():
                    training.train_step(batch)
            else:
                torch.cuda.set_sync_debug_mode("error")
                try:
                    training.train_step(batch)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("host_reads", [True, False])
def test_a_step_with_labels_that_is_not_finite_changes_nothing(
    digits, tmp_path, monkeypatch, device, host_reads
):
    """Of fine-tuning; three of them in a row end it, with the indices of the last one's images. What it has
    saved says how long it took, so far."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=count(0, 20).__next__))  # a step is 20 s
    train, kind = open_labelled(digits["train"]), torch.device(device)
    model = Classifier(
        LVNet(PRESETS["digits"].model, LatentSettings("none"), 8).to(kind), "features", train, False, 0
    )
    recipe = Recipe(1, 128, 0.1, 1e-4, 0, 1e-9, 1, 1)
    host_reads = host_reads and device == "cpu"
    view = PRESETS["digits"].view
    training = SupervisedTrainer(tmp_path, model, train, view, recipe, kind, host_reads=host_reads)
    assert bool(training.optimiser.param_groups[0]["fused"]) is not host_reads
    with training.loader as loader:
        batches = iter(loader)
        for number in range(5):
            batch, before = next(batches), copy.deepcopy(model.state_dict())
            if number > 1:
                batch = dataclasses.replace(batch, views=batch.views * float("nan"))
            training.train_step(batch)
            training.step += 1
            after = model.state_dict()
            changed = [name for name in after if not torch.equal(before[name], after[name])]
            assert bool(changed) is (number < 2) and all(value.isfinite().all() for value in after.values())
            if device == "cuda":
                torch.cuda.synchronize()
            if number < 4:
                training.between_steps(Stop())
        with pytest.raises(FloatingPointError, match="the last of 3 in a row"):
            training.between_steps(Stop())
    assert np.array_equal(np.load(tmp_path / "non_finite_batch.npy"), batch.indices.cpu().numpy())
    training.writer.wait()
    resumed = SupervisedTrainer(tmp_path, model, train, view, recipe, kind, host_reads=host_reads)
    resumed.restore()
    assert (resumed.step, resumed.seconds) == (4, 80)


@pytest.mark.parametrize(
    "wait", [lambda x: x[x > 0], lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(),
             lambda x: x.new_tensor(1.0), lambda x: x.masked_select(x > 0)],
)  # fmt: skip
def test_what_waits_is_found(wait):
    x = torch.randn(5)
    with NoWaits(), pytest.raises(AssertionError):
        wait(x)
