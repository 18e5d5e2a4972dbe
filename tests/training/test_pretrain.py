"""Training: exact resume, even through SIGKILL; checkpoints that survive damage; figures to read."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from devices import on_cpu_and_gpu
from killed import PATIENCE, interrupt_after, wait_for_a_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lvssl.commands.main import main
from lvssl.runs import checkpoint
from lvssl.runs.progress import read_metrics
from lvssl.runs.run import RESULTS_VERSION, create_run, load_run, read_config, run_lock
from lvssl.settings.fields import from_dict, to_dict
from lvssl.settings.pretrain import PRESETS, EngineSettings, PretrainSettings
from lvssl.training import loop
from lvssl.training.optimiser import learning_rate
from lvssl.training.pretrain import pretrain
from lvssl.training.stopping import Interrupted, Stop
from lvssl.training.trainer import Trainer
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.loader import LoaderSettings, TwoViewLoader

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(digits, out: Path, family: str = "bernoulli", **changes) -> PretrainSettings:
    base = PRESETS["digits"]
    return dataclasses.replace(
        base,
        data=digits["train"],
        out=out,
        threads=1,
        epochs=changes.pop("epochs", 2),
        latent=dataclasses.replace(base.latent, family=family),
        **changes,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_latest(folder / "checkpoints")[1]["network"]


def assert_equal_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("family", ["none", "gaussian", "bernoulli"])
def test_stopped_by_a_signal_and_resumed_it_is_the_undisturbed_run(digits, tmp_path, family):
    chosen = {"seed": 3, "order": "sequential" if family == "none" else "random"}
    pretrain(settings(digits, tmp_path / "whole", family, **chosen))
    stopped = settings(digits, tmp_path / "stopped", family, **chosen)
    for _ in range(2):  # in the first epoch and in the second
        stop = random.Random(0).randrange(3, 9)
        with pytest.raises(Interrupted, match="saved"):
            interrupted_after(stopped, stop)
    pretrain(stopped, resume=True)
    assert_equal_weights(tmp_path / "whole", tmp_path / "stopped")
    steps = [row["step"] for row in read_metrics(tmp_path / "stopped" / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 20


def interrupted_after(chosen: PretrainSettings, steps: int) -> None:
    """Trains some steps more, then is told to stop as by SIGTERM."""
    source = open_reader(chosen.data)
    create_run(chosen, 10, resume=True)
    reading = LoaderSettings(chosen.batch_size, chosen.seed, 1, order=chosen.order)
    with TwoViewLoader(source, chosen.view, reading) as loader:
        trainer = Trainer(chosen, 10, loader, torch.device("cpu"))
        trainer.restore()
        stop, step_of = Stop(), trainer.train_step
        target = trainer.step + steps

        def counted(batch):
            if trainer.step + 1 == target:
                stop.signal = signal.SIGTERM
            return step_of(batch)

        trainer.train_step = counted
        trainer.train(stop)


def test_two_processes_never_train_in_one_folder(digits, tmp_path):
    chosen = settings(digits, tmp_path / "run", epochs=1)
    create_run(chosen, 10, resume=False)
    with pytest.raises(InputError, match="no checkpoint yet: remove it to start again"):
        pretrain(chosen)
    with run_lock(chosen.out), pytest.raises(InputError, match="another process is training in .*run"):
        pretrain(chosen, resume=True)
    pretrain(chosen, resume=True)  # the lock ends with its holder
    assert load_run(chosen.out).step == 10
    with pytest.raises(InputError, match="exists: add --resume to continue it, or choose another --out$"):
        pretrain(chosen)


def test_a_run_of_another_results_version_is_read_but_not_resumed(digits, tmp_path):
    chosen = settings(digits, tmp_path / "run", "gaussian", epochs=1)
    pretrain(chosen)
    network = load_run(chosen.out).network
    path = chosen.out / "config.json"
    config = json.loads(path.read_text())
    assert config["versions"].pop("results") == RESULTS_VERSION
    path.write_text(json.dumps(config))
    for name, value in load_run(chosen.out).network.state_dict().items():
        assert torch.equal(value, network.state_dict()[name])
    with pytest.raises(InputError, match=r"run was started with results version 1, but .* not resumed"):
        pretrain(chosen, resume=True)


def test_how_damaged_images_are_treated_may_change_until_one_was_skipped(digits, tmp_path):
    for on_error in ("raise", "skip"):
        create_run(settings(digits, tmp_path / "run", on_error=on_error), 10, resume=on_error == "skip")
        assert read_config(tmp_path / "run")[0].on_error == on_error
    with pytest.raises(InputError, match="on_error: skip -> raise"):
        create_run(settings(digits, tmp_path / "run"), 10, resume=True)


def test_a_run_killed_before_its_settings_were_written_begins_again(digits, tmp_path):
    chosen = settings(digits, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".config.json.0000-1-0.partial").write_text('{"settings": ')
    create_run(chosen, 10, resume=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["classes"] == 10
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("keep me")
    with pytest.raises(InputError, match="notes exists but is not a run folder"):
        create_run(settings(digits, tmp_path / "notes"), 10, resume=True)


LONG = ["--preset", "digits", "--epochs", "500", "--threads", "1"]


def test_sigterm_saves_and_ends(digits, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "lvssl", "pretrain", *LONG, "--data", digits["train"], "--out", run]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    wait_for_a_checkpoint(run, process)
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 143
    message = process.stderr.read()
    step = int(checkpoint.paths(run / "checkpoints")[-1].stem.removeprefix("step-"))
    assert f"stopped at step {step}, saved" in message and "Traceback" not in message


def test_sigterm_ends_a_study_as_the_training_that_it_is_in(digits, tmp_path, monkeypatch, capsys):
    """By the same handler as in a process of its own, which takes seconds to begin."""
    interrupt_after(monkeypatch, Trainer, 3)
    options = ["--train", digits["train"], "--test", digits["test"], "--out", tmp_path]
    assert main(["study", *LONG, *map(str, options), "--arms=none", "--seeds=0"]) == 143
    assert [path.stem for path in checkpoint.paths(tmp_path / "none-s0/checkpoints")] == ["step-000000003"]
    assert "SIGTERM: stopped at step 3, saved" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_with_a_message(digits, tmp_path, capsys):
    pretrain(settings(digits, tmp_path / "run"))
    newest = checkpoint.paths(tmp_path / "run" / "checkpoints")[-1]
    state = checkpoint.load(newest)
    previous = checkpoint.save(newest.parent, state["step"] - 1, state)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    found, _ = checkpoint.load_latest(newest.parent)
    assert found == previous and "damaged" in capsys.readouterr().err
    previous.write_bytes(b"")
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        checkpoint.load_latest(newest.parent)


def test_two_checkpoints_are_kept_and_a_failed_write_leaves_nothing(tmp_path):
    for step in range(5):
        checkpoint.save(tmp_path, step, {"step": step})
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["step-000000003.pt", "step-000000004.pt"]
    with pytest.raises(TypeError):
        checkpoint.write_atomically(tmp_path / "file", b"some", object())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003.pt", "step-000000004.pt"]


@on_cpu_and_gpu
def test_a_checkpoint_is_written_beside_the_training_as_the_state_was(tmp_path, monkeypatch, device):
    """The step goes on while the disk is waited for, and what it changes isn't in the file."""
    disk, save = threading.Event(), checkpoint.save

    def slow(*arguments: Any) -> Path:
        assert disk.wait(60)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    weights = torch.arange(6.0, device=device).reshape(2, 3).T  # and its layout stays
    with checkpoint.Writer() as writer:
        writer.save(tmp_path, 3, {"network": {"w": weights}, "groups": [{"lr": 0.1}], "step": 3})
        weights.add_(1)
        assert not checkpoint.paths(tmp_path)
        disk.set()
    found = checkpoint.load_latest(tmp_path)[1]
    assert torch.equal(found["network"]["w"], torch.arange(6.0).reshape(2, 3).T)
    assert found["network"]["w"].stride() == weights.stride() and found["groups"] == [{"lr": 0.1}]


def test_who_was_stopped_has_saved(digits, tmp_path, monkeypatch):
    """It says so once the checkpoint is on the disk, or the disk's error."""

    def full(*_: Any) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="no space left"):
        interrupted_after(settings(digits, tmp_path / "run", "none"), 1)


def test_a_checkpoint_that_could_not_be_written_is_an_error_at_the_next(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    writer = checkpoint.Writer()
    writer.save(tmp_path / "file" / "below", 1, {"step": 1})
    with pytest.raises(OSError, match="below"):
        writer.save(tmp_path, 2, {"step": 2})
    with pytest.raises(OSError, match="below"), writer:
        writer.save(tmp_path / "file" / "below", 3, {"step": 3})
    with pytest.raises(ZeroDivisionError), writer:  # another error isn't hidden by it
        writer.save(tmp_path / "file" / "below", 4, {"step": 4})
        raise ZeroDivisionError
    assert "no checkpoint was written" in capsys.readouterr().err


def test_checkpoints_come_by_time_and_not_with_every_epoch(digits, tmp_path, monkeypatch):
    """At the end of the first epoch and of the run (and once more, with exact statistics); by time."""
    saved, save = [], checkpoint.save

    def noted(folder: Path, step: int, *rest: Any) -> Path:
        saved.append(step)
        return save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", noted)
    pretrain(settings(digits, tmp_path / "rare", epochs=4, checkpoint_minutes=60.0))
    assert saved == [10, 40, 40]
    saved.clear()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=count(0, 20).__next__))  # a step is 20 s
    engine = EngineSettings(keep=3)
    pretrain(settings(digits, tmp_path / "often", epochs=1, checkpoint_minutes=1.0, engine=engine, log=()))
    assert saved == [3, 6, 9, 10, 10] and not (tmp_path / "often" / "tensorboard").exists()
    kept = checkpoint.paths(tmp_path / "often" / "checkpoints")
    assert [int(path.stem.removeprefix("step-")) for path in kept] == [6, 9, 10]


def test_a_finished_run_is_left_alone(digits, tmp_path):
    pretrain(settings(digits, tmp_path / "run", epochs=1))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").iterdir()}
    pretrain(settings(digits, tmp_path / "run", epochs=1), resume=True)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "checkpoints").iterdir()}


def test_metrics_and_configuration_are_there_to_read(digits, tmp_path):
    chosen = settings(digits, tmp_path / "run", epochs=1, log_every=3)
    optimiser = dataclasses.replace(chosen.optimiser, lr_rule="linear")
    chosen, hook = dataclasses.replace(chosen, optimiser=optimiser), threading.excepthook
    pretrain(chosen)
    assert threading.excepthook is hook  # the log's sinks are closed
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    for name in (
        "loss",
        "ntxent",
        "rate_bits",
        "lr",
        "images_per_second",
        "data_percent",
        "probe_features",
        "probe_code",
    ):
        assert all(isinstance(row[name], float) for row in rows), name
    assert [row["epoch"] for row in rows] == [0.3, 0.6, 0.9, 1.0]
    rates = [learning_rate(step - 1, 10, 10, optimiser, chosen.batch_size) for step in (3, 6, 9, 10)]
    assert [row["lr"] for row in rows] == pytest.approx(rates) and chosen.batch_size != 256
    assert 0 < rows[0]["rate_bits"] < 64 and 1 < rows[-1]["probe_features"] < 100  # percent
    assert all(row["images_per_second"] > 0 for row in rows)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [3, 6, 9, 10]
    run = load_run(tmp_path / "run")
    assert run.settings == chosen and run.step == 10 and len(run.digest) == 64


def test_a_non_finite_loss_stops_and_names_the_batch(digits, tmp_path):
    chosen = settings(digits, tmp_path / "run", log_every=1)
    chosen = dataclasses.replace(
        chosen, optimiser=dataclasses.replace(chosen.optimiser, lr=1e30, warmup_epochs=0)
    )
    with pytest.raises(FloatingPointError, match="non_finite_batch.npy"):
        pretrain(chosen)
    assert (tmp_path / "run" / "non_finite_batch.npy").exists()


def test_settings_survive_json(digits, tmp_path):
    for chosen in PRESETS.values():
        assert from_dict(PretrainSettings, json.loads(json.dumps(to_dict(chosen)))) == chosen
    with pytest.raises(InputError, match="colour"):
        from_dict(PretrainSettings, {"view": {"colour": 1}})
    for earlier, now in ((True, "on"), (False, "off")):
        assert from_dict(PretrainSettings, {"engine": {"compile": earlier}}).engine.compile == now


@pytest.mark.slow
def test_a_compiled_backbone_trains_alike_and_loads_as_any_other(digits, tmp_path):
    for name, compiled in (("plain", "off"), ("compiled", "on")):
        chosen = settings(digits, tmp_path / name, epochs=1)
        engine = dataclasses.replace(chosen.engine, compile=compiled)
        optimiser = dataclasses.replace(chosen.optimiser, optimiser="sgd")
        pretrain(dataclasses.replace(chosen, engine=engine, optimiser=optimiser))
    # AdamW would make a whole step of a gradient's last bits; SGD keeps them small.
    plain, compiled = (load_run(tmp_path / name).network.state_dict() for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name in ("probes.features.weight", "backbone.0.weight"):
        assert torch.allclose(plain[name], compiled[name], atol=2e-3), name
