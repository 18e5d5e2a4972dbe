"""Which GPU a command takes, and how exactly that computes; with spies on torch.cuda where there is none."""

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from devices import GPU

from lvssl.evaluation import stage
from lvssl.models import device as devices
from lvssl.models.device import autocast, claim
from lvssl.runs import checkpoint
from lvssl.runs.run import load_run
from lvssl.settings.pretrain import PRESETS, EngineSettings, LatentSettings
from lvssl.settings.stages import FinetuneSettings, KnnSettings, LinearSettings
from lvssl.training import pretrain as pretraining
from lvssl.training.distributed import World
from lvssl.training.stopping import Stop
from lvssl.training.supervised import Classifier
from pipelines.decode import dali, open_reader
from pipelines.errors import InputError

gpu = pytest.mark.gpu
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("devices") / "run"
    pretraining.pretrain(
        dataclasses.replace(
            PRESETS["digits"], data=digits["train"], out=out, epochs=1, device="cpu", threads=1
        )
    )
    return out


@pytest.fixture
def two_gpus(monkeypatch) -> list[Any]:
    """torch.cuda as if there were two; what is made the current one."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "OLDEST_TRITON", (0, 0))  # nothing is compiled here

    def set_device(device: torch.device) -> None:
        assert device.index is not None, "torch raises ValueError"
        chosen.append(str(device))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return chosen


@pytest.fixture(autouse=True)
def exactness():
    """As it was, after each test."""
    cudnn, matmul = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.benchmark, cudnn.allow_tf32
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    cudnn.benchmark, cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.set_float32_matmul_precision(matmul)


class Stopped(Exception):
    pass


def test_pretraining_claims_the_gpu_that_is_named(digits, tmp_path, monkeypatch, two_gpus):
    """Before it opens the data, or anything else that could take the first."""

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    monkeypatch.setattr(pretraining, "connected", stop)
    for name, expected in (("cuda:1", "cuda:1"), ("cuda", "cuda:0"), ("auto", "cuda:0")):
        chosen = dataclasses.replace(PRESETS["digits"], data=digits["train"], out=tmp_path / "x", device=name)
        with pytest.raises(Stopped):
            pretraining.pretrain(chosen)
        assert two_gpus.pop() == expected and not two_gpus


def test_a_rank_opens_its_data_on_its_own_gpu(digits, tmp_path, monkeypatch, two_gpus):
    opened = []

    def opener(path: Path, kind: str, device: str) -> None:
        opened.append((kind, device))
        raise Stopped

    monkeypatch.setattr(pretraining, "open_reader", opener)
    monkeypatch.setattr(pretraining, "world_of", lambda _: pretraining.World(local_rank=1))
    chosen = dataclasses.replace(PRESETS["digits"], data=digits["train"], out=tmp_path / "x", source="dali")
    with pytest.raises(Stopped):
        pretraining.pretrain(chosen)
    assert opened == [("dali", "cuda:1")]


def test_dali_decodes_on_the_gpu_that_it_is_told(digits, monkeypatch):
    """Its pipelines get the number of the rank's device, and none on a CPU."""
    made = []

    class Pipeline:
        def __init__(self, **options: Any) -> None:
            made.append(options["device_id"])
            raise Stopped

    fake = ModuleType("nvidia.dali")
    fake.fn, fake.types, fake.Pipeline = None, None, Pipeline
    monkeypatch.setitem(sys.modules, "nvidia", ModuleType("nvidia"))
    monkeypatch.setitem(sys.modules, "nvidia.dali", fake)
    monkeypatch.setattr(sys.modules["nvidia"], "dali", fake, raising=False)
    for device, expected in (("cuda:3", 3), ("cuda", 0), ("cpu", None)):
        source = open_reader(digits["train"], "dali", device)
        assert isinstance(source, dali.DALIReader)
        with pytest.raises(Stopped):
            source._made([], torch.zeros(1, 2, 4, dtype=torch.int32).numpy(), None, 8)
        assert made.pop() == expected


def test_a_run_is_loaded_where_it_is_asked_for(run, two_gpus):
    """On a CPU although there are GPUs; on `meta`, which no default would take."""
    for name in ("cpu", "meta"):
        loaded = load_run(run, torch.device(name))
        assert {p.device.type for p in loaded.network.parameters()} == {name}
    assert not two_gpus


def test_a_stage_loads_its_run_on_its_own_device(run, digits, monkeypatch, two_gpus):
    asked = []

    def loaded(folder: Path, device: Any = None) -> Any:
        asked.append(str(device))
        return load_run(folder, torch.device("cpu"))

    monkeypatch.setattr(stage, "load_run", loaded)
    monkeypatch.setattr(stage, "world_of", lambda: pretraining.World(local_rank=1))
    for settings in (KnnSettings(run), LinearSettings(run), FinetuneSettings(run)):
        for name, expected in (("auto", "cuda:1"), ("cuda:0", "cuda:0")):
            found = stage.prepare(
                "x", dataclasses.replace(settings, test=digits["test"], device=name), "x.json"
            )
            assert asked.pop() == two_gpus.pop() == str(found.device) == expected
            assert torch.backends.cudnn.benchmark
    asked.clear()
    found = stage.prepare("x", KnnSettings(run, test=digits["test"], device="cpu"), "x.json")
    assert asked == ["cpu"] and not two_gpus


@pytest.mark.parametrize(
    ("dtype", "matmul", "tf32"),
    [(torch.float32, "highest", False), (torch.bfloat16, "high", True), (torch.float16, "high", True)],
)
def test_fp32_is_fp32_where_it_is_asked_for(two_gpus, dtype, matmul, tf32):
    claim(torch.device("cuda:1"), dtype)
    assert two_gpus == ["cuda:1"]
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 is tf32 and torch.backends.cudnn.benchmark


def test_a_gpu_without_a_number_is_the_current_one(two_gpus):
    claim(torch.device("cuda"))
    assert not two_gpus and torch.backends.cudnn.benchmark


@pytest.mark.parametrize("version", ["3.2.0", "3.5.1", None])
def test_a_triton_that_cannot_compile_the_kernels_is_refused_before_work(monkeypatch, two_gpus, version):
    """Triton 3.2, which torch 2.6 brings, aborts the process while it compiles some of them."""
    monkeypatch.setattr(devices, "OLDEST_TRITON", (3, 6))
    triton = ModuleType("triton")
    triton.__version__ = version
    monkeypatch.setitem(sys.modules, "triton", triton if version else None)
    with pytest.raises(
        InputError, match=f"needs Triton 3.6 or newer, found {version or 'none'}: install torch"
    ):
        claim(torch.device("cuda:1"))
    assert not two_gpus
    triton.__version__ = "3.10.0+git"
    monkeypatch.setitem(sys.modules, "triton", triton)
    claim(torch.device("cuda:1"))


def test_a_cpu_has_nothing_to_claim(monkeypatch):
    def touched(*_: Any) -> None:
        raise AssertionError("torch.cuda was touched")

    monkeypatch.setattr(torch.cuda, "set_device", touched)
    before = torch.get_float32_matmul_precision()
    claim(torch.device("cpu"), torch.bfloat16)
    assert torch.get_float32_matmul_precision() == before


def test_a_stage_computes_as_its_run_unless_told_otherwise(run, digits):
    def engine(settings: Any) -> EngineSettings:
        found = stage.prepare("x", dataclasses.replace(settings, test=digits["test"]), "x.json")
        trained = dataclasses.replace(found.run.settings, engine=EngineSettings(precision="bf16"))
        return dataclasses.replace(found, run=dataclasses.replace(found.run, settings=trained)).engine

    assert engine(LinearSettings(run, device="cpu")).precision == "bf16"
    assert engine(FinetuneSettings(run, precision="fp16", device="cpu")).precision == "fp16"
    assert engine(KnnSettings(run, device="cpu")).precision == "fp32", "it trains nothing, and must be exact"


def test_the_encoder_of_a_stage_reads_in_the_precision_asked_for(run, digits, monkeypatch):
    """On a GPU a run is loaded to read in its own, whatever surrounds it."""
    load_run = stage.load_run

    def loaded(*arguments: Any) -> Any:
        found = load_run(*arguments)
        found.network.precision = torch.bfloat16
        return found

    monkeypatch.setattr(stage, "load_run", loaded)
    for kind in (LinearSettings, FinetuneSettings):
        asked = kind(run, test=digits["test"], device="cpu", precision="fp32")
        found = stage.prepare("x", asked, "x.json")
        model = Classifier(found.run.network, "features", found.sets()[0], frozen=True, seed=0)
        with autocast(found.engine, found.device):
            assert model.network.features(torch.zeros(2, 3, 8, 8)).dtype == torch.float32
        assert found.run.arithmetic == "cpu fp32"


class Guard:
    """As torch.cuda.device_of, which makes a tensor's device the current one."""

    def __init__(self) -> None:
        self.inside = False

    def __call__(self, _: torch.Tensor) -> Any:
        return self

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False


def launches() -> dict[str, Callable[[], Any]]:
    """Every function that launches kernels of ours, on a few numbers."""
    from lvssl.latents import family, fused_triton, noise_triton
    from lvssl.losses import gpu as loss
    from lvssl.losses.block import Block, Weighed
    from pipelines.augment import gpu as augmentation
    from pipelines.views import ViewSettings

    x, ones, rows = torch.zeros(4, 16), torch.ones(4), torch.arange(4)
    block, weighed = Block(x, ones), Weighed(x, ones, ones, ones)
    found = {
        "log_sum_exp": lambda: loss.log_sum_exp(block, block, (0,), 1.0),
        "gradient": lambda: loss.gradient(weighed, weighed, (0,), 1.0),
        "log_gammas": lambda: noise_triton.log_gammas(x, 2, rows[:1], rows, 0, 12),
        "augment": lambda: augmentation.augment(
            torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, 13), ViewSettings(resolution=8)
        ),
    }
    for name in ("bernoulli", "gaussian", "categorical"):
        kind = family(name, categories=4)
        parameters = torch.zeros(4, kind.parameter_count(16))
        sample = parameters[:, :16]
        found[f"{name} forward"] = partial(fused_triton.forward, kind, parameters, rows[:1], rows, 2)
        found[f"{name} backward"] = partial(
            fused_triton.backward, kind, parameters, rows[:1], rows, 2, sample, ones, ones
        )
    return found


def test_every_kernel_is_launched_on_its_tensors_device(monkeypatch):
    """Triton launches on the current device, whatever its arguments lie on."""
    pytest.importorskip("triton", reason="torch's CUDA builds bring triton; a CPU build does not")
    from triton.runtime import JITFunction

    guard, launched = Guard(), []
    monkeypatch.setattr(torch.cuda, "device_of", guard)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: launched.append((kernel, guard.inside)))
    for name, launch in launches().items():
        before = len(launched)
        launch()
        assert len(launched) > before, name
        assert all(inside for _, inside in launched[before:]), name
    assert len({kernel for kernel, _ in launched}) == 11


@gpu
@several
@pytest.mark.parametrize("name", ["log_sum_exp", "bernoulli forward", "log_gammas", "augment"])
def test_kernels_run_on_another_gpu_than_the_current(name):
    """An illegal address, where a kernel of one device is given another's memory."""
    torch.cuda.set_device(0)
    with torch.device("cuda:1"):
        launches()[name]()
    torch.cuda.synchronize(1)


@gpu
@several
def test_nothing_is_put_on_the_first_gpu(digits, tmp_path):
    out = tmp_path / "run"
    pretraining.pretrain(
        dataclasses.replace(PRESETS["digits"], data=digits["train"], out=out, epochs=1, device="cuda:1")
    )
    assert torch.cuda.max_memory_allocated(1) and not torch.cuda.max_memory_allocated(0)


def test_a_gpu_that_is_not_there_is_refused_by_its_number(two_gpus):
    assert devices.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="--device cuda:2: this machine has 2 GPUs, numbered from 0"):
        devices.pick_device("cuda:2")


def test_deterministic_means_algorithms_that_are(monkeypatch, two_gpus):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    claim(torch.device("cuda:1"), torch.bfloat16, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.nn.functional.max_unpool1d(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), 2)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("family", ["none", "bernoulli", "gaussian", "vmf"])
def test_a_deterministic_run_repeats_its_bits(digits, tmp_path, device, family):
    """And no step of it needs an operation that has no deterministic form."""
    states = []
    for out in (tmp_path / "a", tmp_path / "b"):
        pretraining.pretrain(
            dataclasses.replace(
                PRESETS["digits"],
                data=digits["train"],
                out=out,
                epochs=1,
                batch_size=512,
                device=device,
                threads=1,
                latent=LatentSettings(family),
                engine=EngineSettings(deterministic=True),
                workers=1,
            )
        )
        states.append(checkpoint.load(checkpoint.latest(out / "checkpoints"))["network"])
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_a_graph_is_of_one_rank(digits, tmp_path):
    chosen = dataclasses.replace(
        PRESETS["digits"], data=digits["train"], out=tmp_path / "x", engine=EngineSettings(graph="on")
    )
    with pytest.raises(InputError, match="--graph on supports only one rank, but there are 2"):
        pretraining.run(chosen, False, World(0, 2), torch.device("cpu"), Stop(), lambda: None)
    assert not (tmp_path / "x").exists()
