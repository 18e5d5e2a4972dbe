"""The whole recipes at the smallest size at which they still are themselves."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lvssl.runs import checkpoint
from pipelines.convert.conversion import Settings, convert

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"  # beside the checkout
SAMPLE = SHARED / "imagenet-sample" / "imagenet-1k-one-per-class.tar"
RANKS = 2


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as two ranks on this machine, one thread each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node", str(RANKS), "--master-port", str(port)]
    command = [sys.executable, "-m", *launcher, "-m", "lvssl", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_latest(folder / "checkpoints")[1]["model"]


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(run, tmp_path, lvssl):
    options = {
        "linear": ["linear", run, "--probe", "sgd", "--epochs", 2, "--batch-size", 128],
        "finetune": [
            "finetune",
            run,
            "--label-fraction",
            0.2,
            "--epochs",
            1,
            "--min-steps",
            0,
            "--lr",
            0.02,
            "--weight-decay",
            0.0001,
        ],
    }
    options["finetune"] += ["--batch-size", 64]
    for stage, given in options.items():
        alone, together = tmp_path / f"{stage}1", tmp_path / f"{stage}2"
        assert lvssl(*given, "--out", alone, "--threads", 1).returncode == 0
        said = torchrun(*given, "--out", together, "--threads", 1)
        assert said.stdout.count("top-1") == 1, "more than one rank spoke"
        part = "final" if stage == "finetune" else "."
        first, second = weights(alone / part), weights(together / part)
        for name, value in first.items():
            assert torch.allclose(value.float(), second[name].float(), rtol=1e-3, atol=1e-4), (stage, name)
        figures = [
            json.loads((f / "result.json").read_text())["results"]["features"] for f in (alone, together)
        ]
        assert figures[0]["top1"] == pytest.approx(figures[1]["top1"], abs=0.5)
        assert figures[1]["count"] == 500


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.exists(), reason="the ImageNet sample isn't on this machine")
def test_the_imagenet_recipe_goes_the_whole_way(tmp_path, lvssl):
    """ResNet-50, 224 px, LARS, SyncBN, two gloo ranks: pretrain -> linear -> finetune, a few steps each."""
    beton = tmp_path / "train.beton"
    convert(str(SAMPLE), beton, settings=Settings(subset=48))
    run, data = tmp_path / "run", ["--train", beton, "--test", beton]
    stages = {
        "pretrain": [
            *("pretrain", "--preset", "bernoulli-imagenet-r50-100ep", "--data", beton, "--out", run),
            *("--workers", 1, "--batch-size", 16, "--epochs", 1, "--warmup-epochs", 0.3, "--log-every", 1),
        ],
        "linear": [
            *("linear", run, "--preset", "imagenet-linear", *data, "--workers", 1),
            *("--batch-size", 24, "--epochs", 2, "--log-every", 1),
        ],
        "finetune": [
            *("finetune", run, "--preset", "imagenet-finetune", *data, "--workers", 1),
            *("--batch-size", 16, "--epochs", 1, "--log-every", 1),
        ],
    }
    for stage, arguments in stages.items():
        started = time.monotonic()
        torchrun(*arguments)
        seconds = time.monotonic() - started
        folder = {"pretrain": run, "linear": run / "linear", "finetune": run / "finetune-1.0" / "final"}[
            stage
        ]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, {"linear": 4}.get(stage, 3) + 1))
        assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)
        memory = max(row["memory_gib"] for row in rows)
        print(f"{stage:9} {len(rows)} steps, {seconds:6.1f} s, {memory:.2f} GiB a rank")
    config = json.loads((run / "config.json").read_text())["settings"]
    assert config["optimiser"]["optimiser"] == "lars" and config["view"]["resolution"] == 224
    for result in (run / "linear.json", run / "finetune-1.0" / "result.json"):
        assert json.loads(result.read_text())["results"]["features"]["count"] == 48
