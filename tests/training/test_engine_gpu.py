"""The engine on a CUDA device: nothing in a step makes the host wait, and a run of each precision learns."""

import dataclasses
from pathlib import Path

import pytest
import torch

from lvssl.runs.progress import read_metrics
from lvssl.settings.pretrain import PRESETS, EngineSettings, OptimiserSettings
from lvssl.training.distributed import World
from lvssl.training.pretrain import pretrain
from lvssl.training.trainer import Trainer
from pipelines.augment import augmenter_for
from pipelines.decode import open_reader
from pipelines.loader import LoaderSettings, TwoViewLoader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("chunk", [0, 100])
def test_no_step_waits_for_the_device(digits, tmp_path, optimiser, chunk):
    """Once warm, steps run under the mode that makes any synchronisation an error."""
    chosen = dataclasses.replace(
        PRESETS["digits"],
        data=digits["train"],
        out=tmp_path,
        optimiser=OptimiserSettings(optimiser, 0.01, clip=1.0),
        engine=EngineSettings(chunk=chunk, ema=0.9),
    )
    device = torch.device("cuda")
    augmenter = augmenter_for(device, "auto")
    with TwoViewLoader(
        open_reader(chosen.data),
        chosen.view,
        LoaderSettings(chosen.batch_size, augmenter=augmenter, device=device),
    ) as loader:
        trainer = Trainer(chosen, 10, loader, device, World())
        trainer.network.train()
        batches = list(loader)[:6]
        for number, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if number >= 3 else "default")
            try:
                trainer.train_step(batch)
                trainer.finite.in_a_row()
                trainer.step += 1
            finally:
                torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert trainer.finite.in_a_row() == 0 and not trainer.finite.waiting


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_of_each_precision_learns(digits, tmp_path, precision):
    loss = losses(digits["train"], tmp_path / precision, EngineSettings(precision=precision, chunk=100))
    assert loss[-1] < loss[0] - 0.3


def losses(data: Path, out: Path, engine: EngineSettings) -> list[float]:
    chosen = dataclasses.replace(PRESETS["digits"], data=data, out=out, engine=engine, epochs=10)
    pretrain(chosen)
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]
