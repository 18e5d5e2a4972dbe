"""The same images and network give the same features and codes, whoever asks: to the last bit in batches of
the same images, and elsewhere (other batches, ONNX) in every bit whose logit isn't within fp32's rounding of
0."""

import copy
import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lvssl.codes.file import open_codes, open_means, open_uncertainty
from lvssl.codes.quantiser import Quantiser
from lvssl.commands.main import main
from lvssl.evaluation.embedding import Embedding, embed
from lvssl.evaluation.encoder import Encoder
from lvssl.evaluation.linear import represented
from lvssl.evaluation.outputs import network_outputs
from lvssl.evaluation.quantisers import fitted_quantiser, own_bits
from lvssl.models.backbone import BLOCKS
from lvssl.models.inference import encode, in_batches
from lvssl.models.network import LVNet
from lvssl.runs.labels import LabelledDataset, open_labelled
from lvssl.runs.run import Run, load_run
from lvssl.settings.pretrain import PRESETS, EngineSettings
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
    found, answers = predict(model, test_set, loaded.settings.view, workers=2)
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
    """The network, and the average of its weights that is deployed."""
    settings = dataclasses.replace(
        PRESETS["digits"], data=digits["train"], out=tmp_path, workers=2, engine=EngineSettings(ema=0.9)
    )
    source = open_reader(digits["train"])
    with TwoViewLoader(source, settings.view, LoaderSettings(settings.batch_size, workers=1)) as loader:
        trainer = Trainer(settings, 10, loader, CPU)
        networks, heads = (trainer.network.eval(), trainer.ema.module), []
        torch.nn.init.constant_(trainer.ema.module.backbone[1].bias, 0.1)
        for network in networks:
            features = embed(network, source, settings.view).features
            heads.append(copy.deepcopy(network.head))
            heads[-1].calibrate(torch.from_numpy(features))
        calibrate(trainer, source)
    for name in ("mean", "var"):
        found, expected = (
            [head.running(name) for head in some] for some in ([n.head for n in networks], heads)
        )
        assert all(map(torch.equal, found, expected)) and not torch.equal(*expected)


# -- other sums ------------------------------------------------------------------------------------


def logits_of(network: LVNet, images: Tensor) -> Tensor:
    return network.encode(images)[1].parameters


def rounding(
    network: LVNet, images: Tensor, of: Callable[[LVNet, Tensor], Tensor] = logits_of, draws: int = 4
) -> tuple[Tensor, float]:
    """The logits of normalised images in fp64, float64 [N, D], or what else a network gives, and how far fp32
    may be from any of them.

    A sum of k products, in whatever order, rounds by no more than about sqrt(k) * 2^-24 * sum |w x| (Higham
    and Mary 2019, "A new approach to probabilistic rounding error analysis": unless roundings conspire, with
    a factor of a few). The network is run in fp64 with a normal error of this deviation at every result of a
    convolution, a linear layer, a normalisation, a mean and a residual sum; the bound is DEVIATIONS times
    the root mean square of what comes of it, in the number where that is largest.
    """
    exact, generator = copy.deepcopy(network).double(), torch.Generator().manual_seed(0)

    def rounded(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        count, size = terms(module, inputs[0], output)
        noise = torch.randn(size.shape, dtype=size.dtype, generator=generator)
        return output + UNIT * count**0.5 * size * noise

    with torch.no_grad():
        logits = of(exact, images.double())
        for module in exact.modules():
            if isinstance(module, ROUNDING):
                module.register_forward_hook(rounded)
        errors = torch.stack([of(exact, images.double()) - logits for _ in range(draws)])
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
    encoder, alone = Encoder(loaded, own_bits(loaded)), in_batches(torch.from_numpy(crops[:50]), 1)
    assert_same_bits(np.concatenate([part.codes for part in encoder.coded(alone)]), logits_and_bound)


def needs_onnx(test: Callable[..., None]) -> Callable[..., None]:
    there = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))
    missing = pytest.mark.skipif(not there, reason="onnx isn't installed: pip install 'lvssl[export]'")
    old = pytest.mark.skipif(
        torch.__version__ < "2.7", reason="torch 2.6 can't write it as ONNX (docs/versions.md)"
    )
    return missing(old(test))


@needs_onnx
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


# -- codes of a quantiser --------------------------------------------------------------------------


def within_rounding(quantiser: Quantiser, features: Tensor, bound: float, codes: np.ndarray) -> np.ndarray:
    """Of codes of features that fp64 gives, float64 [N, D], and that fp32 gives within the bound: where a bit
    or byte is the nearest word's, or no farther than that by more than fp32's rounding, bool [N, P]."""
    mean, scale, projection, words_PWE = map(np.float64, asdict(quantiser).values())
    z = (features.numpy() - mean) / scale
    x = z @ projection
    # The errors of the features are summed as independent ones, those of the sum bounded as in `rounding`.
    error = bound * np.sqrt(np.square(projection / scale[:, None]).sum(axis=0))
    error = error + DEVIATIONS * UNIT * len(mean) ** 0.5 * (np.abs(z) @ np.abs(projection))
    if quantiser.hamming:
        chosen = unpack_bits(codes, quantiser.bits).astype(bool)
        return (chosen == (x > 0)) | (np.abs(x) <= error)
    x_NPE, error_NPE = (array.reshape(len(x), len(words_PWE), -1) for array in (x, error))
    squares = np.square(x_NPE[:, :, None] - words_PWE).sum(axis=3)
    rows = np.arange(len(words_PWE))
    near, own = words_PWE[rows, squares.argmin(axis=2)], words_PWE[rows, codes]
    excess = np.take_along_axis(squares, codes[:, :, None].astype(int), 2)[:, :, 0] - squares.min(axis=2)
    size = np.square(np.abs(x_NPE) + np.maximum(np.abs(near), np.abs(own))).sum(axis=2)
    allowed = 2 * np.linalg.norm(error_NPE, axis=2) * np.linalg.norm(near - own, axis=2)
    return excess <= allowed + DEVIATIONS * UNIT * x_NPE.shape[2] ** 0.5 * size


@needs_onnx
@pytest.mark.parametrize("code", ["opq", pytest.param("itq", marks=pytest.mark.slow)])
def test_onnx_and_an_export_give_the_codes_of_a_quantiser(code, run, digits, loaded, crops, tmp_path, capsys):
    import onnxruntime

    if code == "opq":
        pytest.importorskip("faiss")
    export, chosen = ["export", str(run), "--out", str(tmp_path / "out")], ["--bits", "56", "--code", code]
    (run / f"quantisers/{code}-56.safetensors").unlink(missing_ok=True)
    assert main([*export, *chosen]) == 2 and not (tmp_path / "out").exists()
    assert f"--bits 56 --code {code}` fits it" in capsys.readouterr().err
    files = [tmp_path / name for name in ("run.lvcodes", "out.lvcodes")]
    encode_test_set = ["--images", str(digits["test"]), *chosen, "--out"]
    assert main(["encode", str(run), *encode_test_set, str(files[0])]) == 0
    assert main([*export, *chosen]) == 0

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "encoder.onnx"))
    found = np.concatenate([session.run(None, {"crops": part})[0] for part in (crops[:1], crops[1:])])
    expected = np.asarray(open_codes(files[0]).rows)
    assert found.dtype == np.uint8 and found.shape == expected.shape == (len(crops), 7)
    assert len(np.unique(expected, axis=0)) > len(crops) / 2, "codes that are all the same prove nothing"
    quantiser = fitted_quantiser(loaded, code, 56)
    images = normalise(torch.from_numpy(crops), loaded.settings.view)
    features, bound = rounding(loaded.network, images, LVNet.features)
    for codes in (found, expected):
        assert within_rounding(quantiser, features, bound, codes).all()
    planted = within_rounding(quantiser, features, bound, found ^ 1)
    assert np.count_nonzero(~planted) > 0.99 * found.size, "a bound that allows another code shows nothing"
    assert (found != expected).mean() < 1e-3

    # The folder alone: the same codes and uncertainties, and it searches those of the run.
    assert main(["encode", str(tmp_path / "out"), *encode_test_set, str(files[1])]) == 0
    assert np.array_equal(open_codes(files[1]).rows, expected)
    assert np.array_equal(*(open_uncertainty(open_codes(file)) for file in files))
    capsys.readouterr()
    search = ["--query", str(digits["test"]), "--codes", str(files[0]), "--k", "2"]
    said = []
    for folder in (run, tmp_path / "out"):
        assert main(["search", str(folder), *search]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].count("\n") > len(crops)
