"""The same images and network give the same features and codes, whoever asks: to the last bit in batches of
the same images, and elsewhere (other batches, ONNX) in every bit whose logit isn't within fp32's rounding of
0."""

import copy
import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lvssl.codes.file import open_codes, open_means
from lvssl.commands.main import main
from lvssl.evaluation.embedding import Embedding, embed
from lvssl.evaluation.encoder import codes_of
from lvssl.evaluation.linear import represented
from lvssl.evaluation.outputs import network_outputs
from lvssl.models.backbone import BLOCKS
from lvssl.models.inference import encode, in_batches
from lvssl.models.network import LVNet
from lvssl.runs.labels import LabelledDataset, open_labelled
from lvssl.runs.run import Run, load_run
from lvssl.settings.pretrain import PRESETS
from lvssl.training.pretrain import calibrate
from lvssl.training.supervised import Classifier, predict
from lvssl.training.trainer import Trainer
from pipelines.decode import open_reader
from pipelines.kernels.pack import pack_bits, unpack_bits
from pipelines.loader import LoaderSettings, TwoViewLoader, evaluation_crops
from pipelines.normalise import normalise

CPU = torch.device("cpu")
UNIT = 2.0**-24  # fp32 rounds by at most this share
DEVIATIONS = 8


@pytest.fixture(scope="module")
def loaded(run) -> Run:
    return load_run(run, CPU)


@pytest.fixture(scope="module")
def test_set(digits) -> LabelledDataset:
    return open_labelled(digits["test"])


@pytest.fixture(scope="module")
def crops(loaded, test_set) -> np.ndarray:
    return evaluation_crops(test_set.source, loaded.settings.view, np.arange(len(test_set)))


@pytest.fixture(scope="module")
def known(loaded, test_set) -> Embedding:
    """What `evaluate`, `knn`, `study` and `compression` measure."""
    return embed(loaded.network, test_set.source, loaded.settings.view)


def test_analyses_read_what_evaluations_embed(loaded, crops, known):
    outputs = network_outputs(loaded.network, crops, loaded.settings.view)
    assert np.array_equal(outputs.features, known.features)
    assert np.array_equal(pack_bits(outputs.bits), known.codes)
    assert np.array_equal(outputs.uncertainty, known.uncertainty)


def test_probes_learn_from_what_evaluations_embed(loaded, test_set, known):
    for on, expected in {
        "features": known.features,
        "code": 2 * unpack_bits(known.codes, known.bits).astype(np.float32) - 1,
    }.items():
        found, kept = represented(loaded, test_set, on, workers=1)
        assert kept is test_set and np.array_equal(found[:], expected)


def test_predictions_are_of_the_features_that_evaluations_embed(loaded, test_set, known):
    width = known.features.shape[1]
    model = Classifier(copy.deepcopy(loaded.network), "features", test_set, frozen=True, seed=0)
    model.linear = nn.Linear(width, width)
    nn.init.eye_(model.linear.weight)  # a sum of a feature and zeros is exact
    nn.init.zeros_(model.linear.bias)
    found, answers = predict(model, test_set, loaded.settings.view, CPU, workers=2)
    assert np.array_equal(found.numpy(), known.features) and torch.equal(answers, test_set.answers)


@pytest.mark.parametrize("kind", ["beton", "folder"])
def test_code_files_hold_what_evaluations_embed(kind, run, digits, test_set, known, tmp_path):
    images, out = digits["test"], tmp_path / "test.lvcodes"
    if kind == "folder":
        images = tmp_path / "images"
        (images / "deep").mkdir(parents=True)
        for i in range(len(test_set)):
            Image.fromarray(test_set.source.encoded(0, i)).save(images / "deep" / f"{i:04d}.png")
    assert main(["encode", str(run), "--images", str(images), "--out", str(out), "--means"]) == 0
    found = open_codes(out)
    assert np.array_equal(found.rows, known.codes)
    assert np.allclose(open_means(found), 2 * known.bit_means - 1, atol=1e-3)  # of fp16


def test_calibration_sees_what_evaluations_embed(digits, tmp_path):
    settings = dataclasses.replace(PRESETS["digits"], data=digits["train"], out=tmp_path, workers=2)
    source = open_reader(digits["train"])
    with TwoViewLoader(source, settings.view, LoaderSettings(settings.batch_size, workers=1)) as loader:
        trainer = Trainer(settings, 10, loader, CPU)
        trainer.network.eval()
        features = embed(trainer.network, source, settings.view).features
        expected = copy.deepcopy(trainer.network.head)
        expected.calibrate(torch.from_numpy(features))
        calibrate(trainer, source)
    for name in ("mean", "var"):
        assert torch.equal(trainer.network.head.running(name), expected.running(name))


# -- other sums ------------------------------------------------------------------------------------


def rounding(network: LVNet, images: Tensor, draws: int = 4) -> tuple[Tensor, float]:
    """The logits of normalised images in fp64, float64 [N, D], and how far fp32 may be from any of them.

    A sum of k products, in whatever order, rounds by no more than about sqrt(k) * 2^-24 * sum |w x| (Higham
    and Mary 2019, "A new approach to probabilistic rounding error analysis": unless roundings conspire, with
    a factor of a few). The network is run in fp64 with a normal error of this deviation at every result of a
    convolution, a linear layer, a normalisation, a mean and a residual sum; the bound is DEVIATIONS times
    the root mean square of what comes of it, in the logit where that is largest.
    """
    exact, generator = copy.deepcopy(network).double(), torch.Generator().manual_seed(0)

    def rounded(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        count, size = terms(module, inputs[0], output)
        noise = torch.randn(size.shape, dtype=size.dtype, generator=generator)
        return output + UNIT * count**0.5 * size * noise

    with torch.no_grad():
        logits = exact.encode(images.double())[1].parameters
        for module in exact.modules():
            if isinstance(module, ROUNDING):
                module.register_forward_hook(rounded)
        errors = torch.stack([exact.encode(images.double())[1].parameters - logits for _ in range(draws)])
    return logits, DEVIATIONS * float(errors.square().mean(dim=(0, 1)).sqrt().max())


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ROUNDING = (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d, *NORMS, *BLOCKS)


def terms(module: nn.Module, x: Tensor, output: Tensor) -> tuple[int, Tensor]:
    """How many terms a module's sums have, and the sums of their sizes."""
    if isinstance(module, nn.Conv2d):
        size = F.conv2d(x.abs(), module.weight.abs(), None, module.stride, module.padding)
        return module.weight[0].numel(), size
    if isinstance(module, nn.Linear):
        return module.in_features, F.linear(x.abs(), module.weight.abs())
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return x[0, 0].numel(), F.adaptive_avg_pool2d(x.abs(), 1)
    if isinstance(module, NORMS):
        shape = (1, -1, *(1 for _ in range(x.dim() - 2)))
        scale = (module.running_var + module.eps).rsqrt() * (module.weight if module.affine else 1)
        offset = (scale * module.running_mean).abs() + (module.bias.abs() if module.affine else 0)
        return 4, (scale.view(shape) * x).abs() + offset.view(shape)
    return 1, output.abs()


@pytest.fixture(scope="module")
def logits_and_bound(loaded, crops) -> tuple[Tensor, float]:
    images = normalise(torch.from_numpy(crops), loaded.settings.view)
    logits, bound = rounding(loaded.network, images)
    assert (logits.abs() < bound).double().mean() < 1e-3, "a bound that many bits are within shows nothing"
    return logits, bound


def test_fp32_is_within_the_bound(loaded, crops, logits_and_bound):
    logits, bound = logits_and_bound
    parts = encode(loaded.network, in_batches(torch.from_numpy(crops)), loaded.settings.view)
    error = (torch.cat([part.posterior.parameters for part in parts]) - logits).abs().max()
    assert 0 < error < bound


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_of_another_size_differ_in_no_other_bit(loaded, crops, logits_and_bound, size):
    some = crops[: 10 * size]
    parts = encode(loaded.network, in_batches(torch.from_numpy(some), size), loaded.settings.view)
    assert_same_bits(np.concatenate([part.codes() for part in parts]), logits_and_bound)


def test_a_query_has_the_code_of_its_image(loaded, crops, logits_and_bound):
    found = [codes_of(loaded, crop[None])[0] for crop in crops[:50]]
    assert_same_bits(np.concatenate(found), logits_and_bound)


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None,
    reason="onnx isn't installed: pip install 'lvssl[export]'",
)
@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 can't write it as ONNX (docs/versions.md)")
def test_onnx_differs_in_no_other_bit(run, crops, known, logits_and_bound, tmp_path: Path):
    import onnxruntime

    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "encoder.onnx"))
    (found,) = session.run(None, {"crops": crops})
    assert_same_bits(found, logits_and_bound)
    assert_same_bits(known.codes, logits_and_bound)


def assert_same_bits(packed: np.ndarray, logits_and_bound: tuple[Tensor, float]) -> None:
    """Codes of the first images have the bits that fp64 gives, wherever the logit exceeds the bound."""
    logits, bound = logits_and_bound[0][: len(packed)].numpy(), logits_and_bound[1]
    differing = unpack_bits(packed, logits.shape[1]).astype(bool) != (logits > 0)
    assert not (differing & (np.abs(logits) > bound)).any()
