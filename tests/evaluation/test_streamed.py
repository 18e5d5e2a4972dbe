"""The probe that reads rows as it needs them, against the exact one."""

import numpy as np
import pytest
import torch

from lvssl.evaluation import streamed
from lvssl.evaluation.probe import linear_probe
from lvssl.evaluation.probe import standardisation as exactly
from lvssl.evaluation.streamed import Bits, drawn, pages, standardisation, streamed_probe
from pipelines.errors import InputError
from pipelines.kernels.pack import pack_bits


@pytest.fixture(scope="module")
def made():
    """Ten classes, by class in order, so that only a shuffled order learns anything; features correlated."""
    generator = np.random.default_rng(0)
    centres, mixing = generator.normal(size=(10, 8)), generator.normal(size=(8, 32))
    sets = []
    for count in (4000, 1000):
        y = np.sort(generator.integers(0, 10, count))
        z = centres[y] + 0.7 * generator.normal(size=(count, 8))
        x = (3 + z @ mixing + 0.3 * generator.normal(size=(count, 32))).astype(np.float32)
        sets += [x, 2 * y + 5]  # labels with gaps
    return sets


def test_it_reaches_what_the_exact_probe_reaches(made, monkeypatch):
    monkeypatch.setattr(streamed, "PAGE", 1)  # as many classes in a batch as a large one has
    monkeypatch.setattr(streamed, "STRENGTHS", (0.1,))  # so strong that another would be seen
    x, y, test_x, test_y = made
    found, learnt = streamed_probe(*made, batch=64, epochs=40), pages(len(y), seed=0)[0]
    strength = (found.regularisation,)
    exact = linear_probe(x[learnt], y[learnt], test_x, test_y, regularisation=strength)
    assert 80 < exact.accuracy < 99 and found.accuracy == pytest.approx(exact.accuracy, abs=0.5)
    assert (found.predictions == exact.predictions).mean() > 0.98
    assert np.abs(found.probabilities - exact.probabilities).mean() < 0.005
    assert found.probabilities.shape == (1000, 10) and found.probabilities.dtype == np.float32


def test_the_strength_is_chosen_on_rows_that_are_not_learnt_from(monkeypatch):
    """Where features are noise, the rows that are learnt from would choose the weakest; in as many epochs as
    make the steps."""
    generator, y, totals = np.random.default_rng(0), np.tile([0, 1, 2], 100), []
    x = generator.normal(size=(300, 200)).astype(np.float32)
    x[:, 0] += 2 * y
    for name, value in {"STRENGTHS": (1.0, 1e-3, 1e-6), "EPOCHS": 2, "STEPS": 160}.items():
        monkeypatch.setattr(streamed, name, value)
    monkeypatch.setattr(streamed, "with_progress", lambda parts, _, total, __: totals.append(total) or parts)
    assert streamed_probe(x, y, x, y, batch=64).regularisation == 1.0
    assert totals == [40 * 300]  # 16 pages of 16 rows are 4 steps an epoch


def test_a_mapped_file_and_bits_are_read_a_batch_at_a_time(made, tmp_path):
    x, y, test_x, test_y = made
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    given = {"batch": 256, "epochs": 2}
    assert (
        streamed_probe(mapped, y, test_x, test_y, **given).accuracy == streamed_probe(*made, **given).accuracy
    )
    bits = [part > part.mean(axis=0) for part in (x, test_x)]
    packed = [Bits(pack_bits(part), 32) for part in bits]
    read, most = Bits.__getitem__, 0

    class Watched(Bits):
        def __getitem__(self, rows):
            nonlocal most
            found = read(self, rows)
            most = max(most, len(found))
            return found

    watched = Watched(packed[0].packed, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "CHUNK", 300)
        found = streamed_probe(watched, y, packed[1], test_y, **given)
        floats = [part.astype(np.float32) for part in bits]
        assert found.accuracy == streamed_probe(floats[0], y, floats[1], test_y, **given).accuracy
    assert most <= 304
    assert np.array_equal(Bits(packed[0].packed, 32, off=-1.0)[3:9], 2 * floats[0][3:9] - 1)


def test_standardisation_is_that_of_the_exact_probe(made, monkeypatch):
    monkeypatch.setattr(streamed, "CHUNK", 77)
    x = np.concatenate([made[0], np.full((4000, 1), 1e4, np.float32)], axis=1)
    for found, wanted in zip(standardisation(x), exactly(x)):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
    assert standardisation(x)[1][-1] == 0


def test_each_row_is_learnt_from_once_an_epoch_or_held_out():
    learnt, held = pages(1003, seed=1)
    epochs = [list(drawn(learnt, 1003, 1, 64, seed)) for seed in (0, 1)]
    rows = [np.concatenate(epoch) for epoch in epochs]
    chosen = np.concatenate(list(drawn(held, 1003, 1, 64, 0)))
    assert np.array_equal(np.sort(np.concatenate([rows[0], chosen])), np.arange(1003))
    assert np.array_equal(np.sort(rows[0]), np.sort(rows[1])) and not np.array_equal(*rows)
    assert 0.1 < len(chosen) / 1003 < 0.2
    first, second = np.split(np.concatenate(list(drawn(learnt, 1003, 2, 64, 0))), 2)
    assert np.array_equal(first, rows[0]) and not np.array_equal(first, second)
    assert np.array_equal(np.sort(first), np.sort(second))


def test_what_cannot_be_learnt_is_named(made):
    x, y, test_x, test_y = made
    broken = x.copy()
    broken[3210, 5] = np.inf
    with pytest.raises(FloatingPointError, match="row 3210 holds a value that isn't finite"):
        streamed_probe(broken, y, test_x, test_y)
    with pytest.raises(InputError, match="at least two classes"):
        streamed_probe(x, np.zeros_like(y), test_x, test_y, device=torch.device("cpu"))
    few = np.r_[np.flatnonzero(y == 5)[:8], np.flatnonzero(y == 7)[:8]]
    with pytest.raises(InputError, match="more than 16 training images, not 16: use --probe logistic"):
        streamed_probe(x[few], y[few], test_x, test_y)


def test_classes_far_apart_leave_no_subnormal_gradients(monkeypatch):
    """They would be multiplied many times as slowly. Each is below what a sum of the others shows."""
    x, y = np.eye(4, dtype=np.float32).repeat(400, axis=0), np.arange(4).repeat(400)
    normal, subnormal, mended = torch.finfo(torch.float32).tiny, 0, streamed.without_subnormals

    def looked_at(gradients):
        nonlocal subnormal
        subnormal += int(((gradients != 0) & (gradients.abs() < normal)).sum())
        found = mended(gradients)
        assert found[found != 0].abs().min() >= streamed.TINY > normal
        assert (gradients - found).abs().max() < streamed.TINY
        return found

    monkeypatch.setattr(streamed, "without_subnormals", looked_at)
    monkeypatch.setattr(streamed, "LR", 5.0)
    assert streamed_probe(x, y, x, y, epochs=20).accuracy == 100
    assert subnormal > 100
