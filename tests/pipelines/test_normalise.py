"""One normalisation: what evaluates, what augments and what is written down as ONNX give the same bits."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import on_cpu_and_gpu
from torch import nn

from pipelines.augment import augment
from pipelines.normalise import normalise
from pipelines.parameters import BRIGHTNESS, CONTRAST, SATURATION, P
from pipelines.views import ViewSettings

VIEWS = {
    "ImageNet's": ViewSettings(resolution=16),
    "another": ViewSettings(resolution=16, mean=(0.1, 0.0, 0.9), std=(1.0, 0.31, 0.007)),
}
BYTES = torch.arange(256, dtype=torch.uint8)
CROPS = BYTES.repeat_interleave(3).reshape(1, 16, 16, 3)  # every byte in every channel


@pytest.mark.parametrize("name", VIEWS)
def test_a_crop_that_nothing_changes_is_augmented_to_the_same_bits(name):
    table = torch.zeros(1, P)
    table[:, [BRIGHTNESS, CONTRAST, SATURATION]] = 1
    found = augment(CROPS, table, VIEWS[name], "numba")
    assert torch.equal(found, normalise(CROPS, VIEWS[name]))


@on_cpu_and_gpu
@pytest.mark.parametrize("name", VIEWS)
def test_it_is_the_definition_rounded_three_times(device, name):
    view = VIEWS[name]
    found = normalise(CROPS.to(device), view).cpu()
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    exact = CROPS.double().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (view.mean, view.std))
    # Roundings of mean, std, LEVEL, scale, shift, two products and the sum: each 2^-24 of what it rounds.
    bound = 2**-24 * (5 * exact / std + 5 * mean / std)
    assert ((found - (exact - mean) / std).abs() <= bound).all()


@on_cpu_and_gpu
def test_every_device_and_every_batch_gives_the_same_bits(device):
    view = VIEWS["ImageNet's"]
    many = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8))
    scale, shift = (np.float32(1) / np.float32(view.std), -np.float32(view.mean) / np.float32(view.std))
    expected = many.numpy().astype(np.float32) * np.float32(1 / 255) * scale + shift
    for part in (slice(None), slice(3, 4), slice(None, None, 2)):
        found = normalise(many[part].to(device), view).cpu().permute(0, 2, 3, 1)
        assert np.array_equal(found.numpy(), expected[part])


class Normalised(nn.Module):
    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return normalise(crops, VIEWS["another"])


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None,
    reason="onnx isn't installed: pip install 'lvssl[export]'",
)
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 can't write it as ONNX (docs/versions.md)")
def test_onnxruntime_gives_the_same_bits(tmp_path: Path):
    import onnxruntime

    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        Normalised().eval(), (CROPS.repeat(2, 1, 1, 1),), input_names=["crops"], output_names=["images"],
        dynamic_shapes={"crops": {0: batch}}, opset_version=18, dynamo=True, verbose=False,
    )  # fmt: skip
    program.save(tmp_path / "normalise.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "normalise.onnx"))
    found = session.run(None, {"crops": CROPS.numpy()})[0]
    assert np.array_equal(found, normalise(CROPS, VIEWS["another"]).numpy())
