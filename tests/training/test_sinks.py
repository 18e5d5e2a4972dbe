"""`--log`: the figures of a training, and of its resumption, where others' libraries find them."""

import importlib.util
import json
import struct

import pytest

from lvssl.commands.main import main
from lvssl.runs.progress import Metrics
from lvssl.runs.sinks import SINKS, about
from lvssl.settings import pretrain

ROWS = [{"step": 10 * i, "epoch": float(i), "loss": 5.5 - i} for i in range(1, 5)]


def logged(folder, sink: str) -> None:
    """Two rows, and after a resumption two more."""
    folder.mkdir()
    settings = {"epochs": 3, "latent": {"family": "bernoulli"}}
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    for resumed_at, rows in ((0, ROWS[:2]), (20, ROWS[2:])):
        metrics = Metrics(folder, resumed_at, (sink,))
        for row in rows:
            metrics.write(row)
        metrics.close()
        for path in (folder / "tensorboard").glob("*"):  # of two begun in one second, number 10 is before 9
            path.rename(path.with_name(path.name.replace(".tfevents.", ".tfevents.0")))
    assert about(folder) == {"epochs": 3, "latent.family": "bernoulli"}


def test_settings_and_code_know_the_same_names():
    assert tuple(SINKS) == pretrain.SINKS


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path / "run", "tensorboard")
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("loss")]
    assert found == [(row["step"], row["loss"]) for row in ROWS] and board.Tags()["scalars"] == ["loss"]


def test_wandb(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb isn't installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged(tmp_path / "run", "wandb")
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its own process has written everything then
    found, names = [], set()
    for path in sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")):
        names.add(path.name)
        data, at = path.read_bytes(), 7  # behind its head; LevelDB's log: checksum, length, kind, record
        while at < len(data):
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            assert kind == 1, "a record over several blocks"
            record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length])
            at += 7 + length
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            if "loss" in items:
                found.append((items.get("_step", record.history.step.num), items["loss"]))
    assert sorted(found) == [(row["step"], row["loss"]) for row in ROWS]
    assert len(names) == 1  # one run, gone on with


def test_mlflow(tmp_path, monkeypatch):
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow isn't installed")
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    logged(tmp_path / "run", "mlflow")
    client = mlflow.tracking.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("lvssl").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(row["step"], row["loss"]) for row in ROWS]
    assert run.data.params == {"epochs": "3", "latent.family": "bernoulli"}


def test_what_is_not_there_is_named_before_anything_is_written(digits, tmp_path, capsys, monkeypatch):
    begin = ["pretrain", "--preset", "digits", "--data", str(digits["train"]), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("lvssl.runs.sinks.importlib.util.find_spec", lambda name: None)  # as if none were
    assert main([*begin, "--log", "wandb"]) == 2
    assert "error: --log wandb: needs wandb: pip install wandb" in capsys.readouterr().err
    assert main([*begin, "--log", "paper"]) == 2
    assert "unknown log 'paper'; known: tensorboard, wandb, mlflow" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_error_that_names_the_folder(small_disk, fill, capsys):
    board = SINKS["tensorboard"](small_disk, 0)
    fill()
    with pytest.raises(OSError, match="No space left on device: .*tensorboard"):
        for row in ROWS * 3000:
            board.add(row["step"], row)
    with pytest.raises(OSError, match="No space left on device: .*tensorboard"):
        board.close()
    assert capsys.readouterr().err == ""
