"""What goes wrong in a week: a full disk, too large a batch, NaN, a dead rank, a signal to one rank only."""

import dataclasses
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import PATIENCE

from lvssl.commands.main import main
from lvssl.runs import checkpoint
from lvssl.settings.pretrain import PRESETS, EngineSettings, ModelSettings, PretrainSettings
from lvssl.training.loop import out_of_memory
from lvssl.training.pretrain import pretrain
from lvssl.training.stopping import stop_signals
from lvssl.training.trainer import Trainer

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lvssl.training.pretrain", "lvssl.commands", "pipelines.loader", "tyro"])


def settings(data: Path, out: Path, **changes) -> PretrainSettings:
    shared: dict[str, Any] = {"epochs": 2, "threads": 1, "workers": 1, "log_every": 1}
    return dataclasses.replace(PRESETS["digits"], data=data, out=out, **{**shared, **changes})


# -- the disk is full -----------------------------------------------------------------------------


def test_a_full_disk_keeps_the_checkpoint_before(small_disk):
    state = {"weights": torch.randn(1_250_000)}  # 5 MB
    first = checkpoint.save(small_disk, 1, state)
    with pytest.raises(
        OSError, match="no space left for a checkpoint of 5 MB, .*; step-000000001.pt still stands"
    ):
        checkpoint.save(small_disk, 2, {"weights": torch.randn(1_250_000)})
    assert [path.name for path in small_disk.iterdir()] == [first.name], "nothing half-written is left"
    path, found = checkpoint.load_latest(small_disk)
    assert path == first and torch.equal(found["weights"], state["weights"])


def test_a_run_on_a_full_disk_ends_and_goes_on_once_there_is_room(digits, small_disk, fill):
    chosen = settings(digits["train"], small_disk / "run", epochs=4, checkpoint_minutes=1e-9)
    save = checkpoint.save

    def fill_then_save(folder: Path, step: int, *rest: Any) -> Path:
        if step == 20:
            fill()
        return save(folder, step, *rest)

    checkpoint.save = fill_then_save
    try:
        with pytest.raises(OSError, match="step-000000020.pt: no space left for a checkpoint"):
            pretrain(chosen)
    finally:
        checkpoint.save = save
    assert checkpoint.load_latest(chosen.out / "checkpoints")[1]["step"] == 19
    (small_disk / "ballast").unlink()
    pretrain(chosen, resume=True)
    assert checkpoint.load_latest(chosen.out / "checkpoints")[1]["step"] == 40


# -- not finite -----------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(steps): their images are NaN; a list of (step, indices, state before, state after)."""

    def plant(steps: range) -> list[tuple[int, np.ndarray, dict, dict]]:
        seen: list[tuple[int, np.ndarray, dict, dict]] = []
        step_of = Trainer.train_step

        def train_step(trainer: Trainer, batch: Any) -> Any:
            bad = trainer.step in steps
            if bad:
                batch = dataclasses.replace(batch, views=batch.views * float("nan"))
            before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
            figures = step_of(trainer, batch)
            if bad:
                after = {k: v.clone() for k, v in trainer.network.state_dict().items()}
                seen.append((trainer.step, batch.indices.numpy(), before, after))
            return figures

        monkeypatch.setattr(Trainer, "train_step", train_step)
        return seen

    return plant


@pytest.mark.parametrize("chunk", [0, 100])
def test_a_step_that_is_not_finite_leaves_no_trace(digits, tmp_path, poisoned, chunk):
    seen = poisoned(range(3, 5))
    engine = EngineSettings(chunk=chunk, ema=0.9)
    pretrain(settings(digits["train"], tmp_path / "run", epochs=1, engine=engine))
    assert [step for step, *_ in seen] == [3, 4]
    for _, _, before, after in seen:
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
    state = checkpoint.load_latest(tmp_path / "run" / "checkpoints")[1]
    for kind in ("network", "ema"):
        assert all(v.isfinite().all() for v in state[kind].values()), kind
    assert state["step"] == 10


def test_too_many_in_a_row_end_the_run_and_name_the_batch(digits, tmp_path, poisoned):
    seen = poisoned(range(3, 9))
    chosen = settings(digits["train"], tmp_path / "run", engine=EngineSettings(non_finite_steps=4))
    with pytest.raises(FloatingPointError, match=r"step 7, the last of 4 in a row.*Lower --lr"):
        pretrain(chosen)
    assert [step for step, *_ in seen] == [3, 4, 5, 6]
    assert np.array_equal(np.load(tmp_path / "run" / "non_finite_batch.npy"), seen[-1][1])


# -- too large ------------------------------------------------------------------------------------


def too_large(data: Path, folder: Path, chunk: int) -> None:
    """A batch that doesn't fit into what memory this process may still take."""
    torch.set_num_threads(1)
    used = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + 900 * 2**20, resource.RLIM_INFINITY))
    base = PRESETS["digits"]
    chosen = settings(
        data,
        folder / f"run{chunk}",
        batch_size=1290,
        epochs=1,
        model=ModelSettings("small", 64, 64),
        view=dataclasses.replace(base.view, resolution=32),
        engine=EngineSettings(chunk=chunk),
    )
    try:
        pretrain(chosen)
        said = "it fits"
    except MemoryError as error:
        said = str(error)
    (folder / f"said{chunk}").write_text(said)


@pytest.mark.parametrize(
    ("chunk", "said"),
    [
        (0, ("out of memory with 2580 views on this rank: try --chunk 645", "--recompute")),
        pytest.param(200, ("it fits",), marks=pytest.mark.slow),
    ],
)
def test_out_of_memory_names_the_setting_that_helps_and_it_helps(digits, tmp_path, chunk, said):
    process = processes.Process(target=too_large, args=(digits["train"], tmp_path, chunk))
    process.start()
    process.join(300)
    for words in said:
        assert words in (tmp_path / f"said{chunk}").read_text()


def test_what_an_error_came_of_says_whether_memory_was_short():
    """A recording that runs out of memory ends with an error about the recording."""

    def recording(cause: BaseException) -> BaseException:
        try:
            try:
                raise cause
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as error:
            return error

    assert out_of_memory(recording(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert not out_of_memory(recording(ValueError("shapes"))) and not out_of_memory(RuntimeError("shapes"))


# -- several ranks --------------------------------------------------------------------------------


def command(rank: int, port: int, arguments: list[str], words: Path) -> None:
    """`lvssl ARGUMENTS` as one of two ranks, in a process that has imported all."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(main(arguments))


class Ranks:
    """`lvssl pretrain` as two ranks, once they have made a step."""

    def __init__(self, run: Path, data: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = ["pretrain", "--preset", "digits", "--epochs", "500", "--data", str(data)]
        arguments += ["--out", str(run), "--threads", "1", "--workers", "1"]
        self.words = [run.parent / f"words-{rank}" for rank in range(2)]
        self.ranks = [
            processes.Process(target=command, args=(rank, port, arguments, self.words[rank]))
            for rank in range(2)
        ]
        for rank in self.ranks:
            rank.start()
        deadline = time.monotonic() + PATIENCE
        while not checkpoint.paths(run / "checkpoints"):
            assert time.monotonic() < deadline and all(rank.is_alive() for rank in self.ranks), self.said()
            time.sleep(0.05)

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.ranks[rank].pid, number)

    def ended(self, which: tuple[int, ...] = (0, 1), timeout: float = 60) -> list[int | None]:
        """Exit statuses; None for a rank that goes on for longer than a minute."""
        end = time.monotonic() + timeout
        for rank in which:
            self.ranks[rank].join(max(0, end - time.monotonic()))
        statuses = [self.ranks[rank].exitcode for rank in which]
        for rank in self.ranks:
            rank.kill()
        return statuses

    def said(self) -> list[str]:
        return [words.read_text() if words.exists() else "" for words in self.words]


def test_a_signal_asks_for_a_stop_and_means_what_it_meant_before_afterwards():
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with stop_signals() as stop:
            assert callable(signal.getsignal(number))  # or it would end this process
            signal.raise_signal(number)
        assert stop.signal == number and [signal.getsignal(each) for each in numbers] == before


def test_a_signal_to_one_rank_saves_and_ends_all(digits, tmp_path):
    ranks = Ranks(tmp_path / "run", digits["train"])
    ranks.signal(1, signal.SIGUSR2)
    assert ranks.ended() == [143, 143], ranks.said()
    step = checkpoint.load_latest(tmp_path / "run" / "checkpoints")[1]["step"]
    for words in ranks.said():
        assert f"SIGUSR2: stopped at step {step}, saved" in words


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_the_others_with_a_message(digits, tmp_path, dead):
    ranks = Ranks(tmp_path / "run", digits["train"])
    ranks.signal(dead, signal.SIGKILL)
    other = 1 - dead
    assert ranks.ended((other,)) == [1], ranks.said()
    words = ranks.said()[other]
    assert f"error: rank {other} of 2" in words and "died or disconnected" in words and "--resume" in words
    assert "Traceback" not in words


@pytest.mark.slow
def test_a_rank_that_hangs_is_dead_within_a_minute(digits, tmp_path):
    """Stopped, it closes no connection, and the other waits in a collective: the missing heartbeat tells."""
    ranks = Ranks(tmp_path / "run", digits["train"])
    ranks.signal(1, signal.SIGSTOP)
    assert ranks.ended((0,)) == [1]
    assert "rank 1 died or disconnected (no sign of life for 40 s)" in ranks.said()[0]


@pytest.mark.slow
def test_torchrun_trains_and_ends_well(digits, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "lvssl", "pretrain", "--preset", "digits", "--epochs", "2", "--threads", "1"]
    command += ["--data", str(digits["train"]), "--out", str(tmp_path / "run"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done; next") == 1, "rank 0 alone speaks"
    assert checkpoint.load_latest(tmp_path / "run" / "checkpoints")[1]["step"] == 20
