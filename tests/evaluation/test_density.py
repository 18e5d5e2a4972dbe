"""The score `density` against scipy's and scikit-learn's, and what is kept of it with the run."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf

from lvssl.commands.main import main
from lvssl.evaluation.density import Density, density_of, fit_density
from lvssl.evaluation.fitted import TrainingImages, keep, kept
from lvssl.models.backbone import stage_widths
from lvssl.runs.identity import describe_set
from lvssl.runs.run import load_run
from pipelines.decode import open_reader
from pipelines.errors import InputError


def made(n=400, width=6, seed=0):
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(5).normal(size=(width, width))
    return (generator.normal(size=(n, width)) @ mixing * 3 + np.arange(width)).astype(np.float32)


def log_density(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """By scipy and scikit-learn."""
    train, test = train.astype(np.float64), test.astype(np.float64)
    scale = train.std(axis=0)
    covariance = LedoitWolf().fit((train - train.mean(axis=0)) / scale).covariance_ * np.outer(scale, scale)
    return multivariate_normal(train.mean(axis=0), covariance).logpdf(test)


def test_one_gaussian_is_scipys_with_the_covariance_of_scikit_learn():
    train, test = made(), made(50, seed=1)
    assert np.allclose(fit_density(train)(test), -log_density(train, test) / 6, rtol=1e-4)


def test_of_several_stages_it_is_their_mean_a_number():
    train, test = (
        np.hstack([made(n, 4, s), made(n, 6, s + 1), made(n, 2, s + 2)]) for n, s in ((400, 0), (50, 7))
    )
    parts = [slice(0, 4), slice(4, 10), slice(10, 12)]
    wanted = np.mean([-log_density(train[:, p], test[:, p]) / (p.stop - p.start) for p in parts], axis=0)
    assert np.allclose(fit_density(train, (4, 6, 2))(test), wanted, rtol=1e-4)


def test_a_constant_number_and_fewer_images_than_numbers_leave_it_finite():
    train = made(5, 12)
    train[:, 3] = 7
    density = fit_density(train)
    assert np.isfinite(density(made(30, 12, seed=1))).all()
    assert density(train[:0]).shape == (0,)
    assert np.isfinite(fit_density(np.ones((3, 12), np.float32))(train)).all()  # images that are all the same
    with pytest.raises(ValueError, match=r"activations \[N, 12\]"):
        density(train[:, :3])
    with pytest.raises(ValueError, match="at least two images"):
        fit_density(train[:1])


def test_the_unit_of_the_activations_shifts_it_alone():
    """As a density does, c x having a density of 1 / c that of x; with a constant number, too."""
    train, test = made(), made(50, seed=1)
    train[:, 3], test[:, 3] = 7, 7.5
    one, thousandth = fit_density(train)(test), fit_density(train / 1000)(test / 1000)
    assert np.allclose(thousandth, one - np.log(1000), rtol=1e-3)


@pytest.mark.parametrize("which", ["run", "control"])
def test_it_is_fitted_on_the_training_images_once_and_kept_with_the_run(which, request, digits):
    folder = request.getfixturevalue(which)
    run, path = load_run(folder, torch.device("cpu")), folder / "density.safetensors"
    path.unlink(missing_ok=True)
    sample = TrainingImages(run).sample("stages")
    first = density_of(TrainingImages(run))
    widths = stage_widths(run.settings.model.backbone)
    assert np.array_equal(first(sample), fit_density(sample, widths)(sample))
    written = path.read_bytes()
    again = density_of(TrainingImages(load_run(folder, torch.device("cpu"))))
    assert path.read_bytes() == written and np.array_equal(again(sample), first(sample))
    foreign = np.random.default_rng(0).permuted(sample, axis=0)  # each number as usual, their company not
    assert first(foreign).mean() > first(sample).mean() + 0.1
    path.write_bytes(written[:100])
    with pytest.raises(InputError, match=r"density.safetensors: can't be read .* remove it"):
        density_of(TrainingImages(run))
    path.unlink()


def test_what_is_fitted_is_kept_as_the_same_bytes(run, tmp_path):
    """The library writes metadata in an order of its own each time."""
    loaded, arrays, about = load_run(run), asdict(fit_density(made())), {"train": "\u00e9", "of": "stages"}
    written = set()
    for number in range(12):
        keep(tmp_path / str(number), arrays, loaded, about)
        written.add((tmp_path / str(number)).read_bytes())
    assert len(written) == 1
    found = kept(tmp_path / "0", loaded, about)
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_training_images_that_are_not_there_are_one_line(run, tmp_path):
    loaded = load_run(run, torch.device("cpu"))
    with pytest.raises(InputError, match=r"gone.beton.*--train.*--no-fit"):
        density_of(TrainingImages(loaded, tmp_path / "gone.beton"))


def test_a_sample_read_in_batches_is_the_whole_one_and_lies_evenly_over_the_set(run):
    loaded = load_run(run, torch.device("cpu"))
    whole, features = (TrainingImages(loaded).sample(kind) for kind in ("stages", "features"))
    few = TrainingImages(loaded, limit=100).sample("stages")
    rows = np.linspace(0, len(whole) - 1, 100).astype(int)
    assert len(features) == len(whole) and np.allclose(few, whole[rows], rtol=1e-4, atol=1e-4)
    assert isinstance(fit_density(few), Density)


def test_what_is_fitted_is_fitted_again_if_other_images_are_where_they_were(run, digits, tmp_path, capsys):
    folder, there = tmp_path / "run", tmp_path / "train.beton"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("density.safetensors", "quantisers"))
    shutil.copy(digits["train"], there)
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["data"] = str(there)
    config["data"] = describe_set(open_reader(there))
    (folder / "config.json").write_text(json.dumps(config))

    def encoded(*more: str) -> tuple[bytes, bytes, str]:
        out = folder / "codes.lvcodes"
        encode = ["encode", str(folder), "--images", str(digits["test"]), "--out", str(out)]
        assert main([*encode, "--bits", "16", "--code", "itq", *more]) == 0
        fitted = (folder / "density.safetensors", folder / "quantisers/itq-16.safetensors")
        return *(path.read_bytes() for path in fitted), capsys.readouterr().err

    first = encoded()
    assert "note: " not in first[2]
    shutil.copy(digits["test"], there)  # those that the run was trained on are still what was fitted on
    assert encoded()[:2] == first[:2]
    (folder / "density.safetensors").unlink()
    density, quantiser, said = encoded("--train", str(there))
    assert density != first[0] and quantiser != first[1] and "isn't the set" not in said
    assert encoded()[:2] == (density, quantiser)  # of what is there now
    shutil.move(there, tmp_path / "moved.beton")
    assert encoded("--train", str(tmp_path / "moved.beton"))[:2] == (density, quantiser)
    for path in (folder / "density.safetensors", folder / "quantisers/itq-16.safetensors"):
        path.unlink()
    shutil.copy(digits["test"], there)
    assert f"{there} isn't the set that {folder} was trained on (it has " in encoded()[2]
    shutil.copy(digits["train"], there)
    assert encoded()[:2] == first[:2]
