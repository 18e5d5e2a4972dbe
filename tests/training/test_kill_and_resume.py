"""Killed and resumed, a run is the undisturbed one, bit for bit: any optimiser, average, cache, two ranks.

Runs are processes of their own, forked from one that has imported all, and killed by SIGKILL.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lvssl.runs import checkpoint
from lvssl.runs.progress import read_metrics
from lvssl.settings.pretrain import PRESETS, EngineSettings, OptimiserSettings, PretrainSettings
from lvssl.training.pretrain import pretrain
from lvssl.training.trainer import Trainer

TIMEOUT = 300
EVERY_STEP = 1e-9  # minutes between checkpoints
CASES = {
    "adamw": (OptimiserSettings(), EngineSettings(ema=0.9, chunk=100)),
    "sgd": (OptimiserSettings("sgd", 0.1, nesterov=True, clip=1.0), EngineSettings(ema=0.9, chunk=100)),
    "lars": (OptimiserSettings("lars", 1.0), EngineSettings(ema=0.9, chunk=100, recompute=True)),
    "fp16": (OptimiserSettings(), EngineSettings(precision="fp16", ema=0.9)),
}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lvssl.training.pretrain", "lvssl.settings.pretrain", "pipelines.loader"])


def settings(data: Path, out: Path, case: str, **changes) -> PretrainSettings:
    """20 steps, unless the changes say otherwise."""
    optimiser, engine = CASES[case]
    base = dataclasses.replace(PRESETS["digits"], optimiser=optimiser, engine=engine)
    shared = {"epochs": 2, "threads": 1, "workers": 1, "log_every": 1, "checkpoint_minutes": EVERY_STEP}
    return dataclasses.replace(base, data=data, out=out, **{**shared, **changes})


def life(chosen: PretrainSettings, die_after: int, rank: int, size: int, port: int) -> None:
    """One life of one rank; SIGKILL as soon as the step `die_after` is done and saved."""
    torch.set_num_threads(1)
    if size > 1:
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    between = Trainer.between_steps

    def then_die(trainer: Trainer, stop: Any) -> None:
        between(trainer, stop)
        if trainer.step == die_after:
            trainer.writer.wait()
            if size > 1:
                torch.distributed.barrier()  # rank 0 has saved
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.between_steps = then_die
    pretrain(chosen, resume=True)


def live(chosen: PretrainSettings, die_after: int = 0, size: int = 1) -> list[int | None]:
    """Exit codes of all ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        processes.Process(target=life, args=(chosen, die_after, rank, size, port)) for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(TIMEOUT)
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]


def assert_same(one: Path, other: Path) -> None:
    """The whole state, bit for bit, and figures whose steps only grow."""
    first, second = (checkpoint.load_latest(run / "checkpoints")[1] for run in (one, other))
    assert differing(first, second) == []
    rows = [read_metrics(run / "metrics.jsonl") for run in (one, other)]
    assert [row["step"] for row in rows[1]] == list(range(1, first["step"] + 1))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert not list((other / "checkpoints").glob(".*"))


def differing(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what isn't equal in two states."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict | list | tuple):
        assert len(a) == len(b), name
        pairs = a.items() if isinstance(a, dict) else enumerate(a)
        return [wrong for key, value in pairs for wrong in differing(value, b[key], f"{name}/{key}")]
    return [] if a == b else [name]


@pytest.mark.parametrize(
    ("case", "size"),
    [
        ("sgd", 1),
        *(pytest.param(case, 1, marks=pytest.mark.slow) for case in ("adamw", "lars", "fp16")),
        *(pytest.param(case, 2, marks=pytest.mark.slow) for case in ("adamw", "lars", "sgd")),
    ],
)
def test_seven_steps_kill_resume_thirteen_are_twenty(digits, tmp_path, case, size):
    whole, killed = (settings(digits["train"], tmp_path / name, case) for name in ("whole", "killed"))
    assert live(whole, size=size) == [0] * size
    assert live(killed, 7, size) == [-signal.SIGKILL] * size
    state = checkpoint.load_latest(killed.out / "checkpoints")[1]
    assert state["step"] == 7 and (state["ema"] is None) == (not killed.engine.ema)
    assert live(killed, size=size) == [0] * size
    assert_same(whole.out, killed.out)


def test_a_run_of_two_ranks_goes_on_with_one(digits, tmp_path):
    """Order, augmentation and noise belong to the images, so the same batches follow."""
    chosen = settings(digits["train"], tmp_path / "run", "sgd", engine=EngineSettings())
    assert live(chosen, 7, 2) == [-signal.SIGKILL] * 2
    assert live(chosen) == [0]
    rows = read_metrics(chosen.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    pretrain(dataclasses.replace(chosen, out=tmp_path / "alone", epochs=1))
    first = read_metrics(tmp_path / "alone" / "metrics.jsonl")[0]
    assert rows[0]["loss"] == pytest.approx(first["loss"], rel=1e-3)  # another batch differs by a tenth


def test_the_average_is_what_its_formula_says(digits, tmp_path):
    """e <- d e + (1 - d) w from the initial weights on, running statistics too; and it is what is loaded."""
    from lvssl.runs.run import load_run

    chosen = settings(digits["train"], tmp_path / "run", "sgd", epochs=1)
    steps, seen = Trainer.train_step, []

    def watched(trainer: Trainer, batch: Any) -> Any:
        if not seen:
            seen.append({k: v.clone() for k, v in trainer.network.state_dict().items()})
        figures = steps(trainer, batch)
        seen.append({k: v.clone() for k, v in trainer.network.state_dict().items()})
        return figures

    Trainer.train_step = watched
    try:
        pretrain(chosen)
    finally:
        Trainer.train_step = steps
    state = checkpoint.load_latest(chosen.out / "checkpoints")[1]
    loaded = load_run(chosen.out).network.state_dict()
    for name in ("backbone.0.weight", "backbone.1.running_var", "projector.3.bias"):
        expected = seen[0][name].double()
        for weights in seen[1:]:
            expected = 0.9 * expected + 0.1 * weights[name].double()
        torch.testing.assert_close(state["ema"][name], expected.float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(loaded[name], state["ema"][name]) and not torch.equal(
            loaded[name], state["network"][name]
        )


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kills"), [(1, 100), (2, 20)])
def test_killed_at_random_points(digits, tmp_path, size, kills):
    """SIGKILL at any moment: in start-up, in steps, in saving (a checkpoint after every step)."""
    generator, done, number = random.Random(0), 0, 0
    whole = settings(digits["train"], tmp_path / "whole", "lars")
    assert live(whole, size=size) == [0] * size
    while done < kills:
        number += 1
        chosen = dataclasses.replace(whole, out=tmp_path / f"killed-{number}")
        while (finished := lived_until(chosen, generator, size)) is False:
            done += 1
        assert finished == [0] * size
        assert_same(whole.out, chosen.out)
    print(f"{done} kills in {number} runs of {size} ranks")


def lived_until(chosen: PretrainSettings, generator: random.Random, size: int) -> list[int] | bool:
    """False if it was killed, at a random moment up to a few steps; exit codes if it was sooner done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [processes.Process(target=life, args=(chosen, 0, rank, size, port)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    before = checkpoint.paths(chosen.out / "checkpoints")[-1:]
    if generator.random() < 0.8:  # else in start-up
        deadline = time.monotonic() + TIMEOUT
        while checkpoint.paths(chosen.out / "checkpoints")[-1:] == before and ranks[0].is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
    time.sleep(generator.uniform(0, 0.2))
    finished = not any(rank.is_alive() for rank in ranks)
    for rank in generator.sample(ranks, size):
        rank.kill()
    for rank in ranks:
        rank.join()
    codes = [rank.exitcode for rank in ranks]
    return codes if finished or codes == [0] * size else False


@pytest.mark.slow
def test_a_resumed_job_finds_what_the_one_before_has_compiled(digits, tmp_path):
    """Beside the run, and not in the folder that torch names by itself when it is loaded."""
    out = tmp_path / "run"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    script = [sys.executable, str(Path(__file__).with_name("compiled_run.py")), digits["train"], out]
    jobs = []
    for _ in range(2):
        done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        jobs.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = jobs
    assert first["miss"] > 0 == first["hit"], "else it says nothing"
    assert second == {"hit": first["miss"], "miss": 0}
    assert any((out / "compiled").iterdir())
