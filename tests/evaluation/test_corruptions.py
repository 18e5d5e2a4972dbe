import numpy as np
import pytest

from lvssl.evaluation.corruptions import CORRUPTIONS, OUT_OF_DISTRIBUTION, SEVERITIES, corrupt, texture_images
from lvssl.evaluation.shapes import make_shapes


@pytest.fixture(scope="module")
def images():
    shapes, textures = make_shapes(24, 48).images, texture_images(24, 48)
    return (shapes // 2 + textures // 2).astype(np.uint8)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_step_takes_more_of_the_image(images, kind):
    distance = [abs(corrupt(images, kind, s).astype(int) - images).mean() for s in (0, *SEVERITIES)]
    assert distance[0] == 0 and (np.diff(distance) > 0).all(), distance
    assert corrupt(images, kind, 3).shape == images.shape and corrupt(images, kind, 3).dtype == np.uint8


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_seed_decides_and_the_input_stays(images, kind):
    before = images.copy()
    first = corrupt(images, kind, 4, seed=1)
    assert (first == corrupt(images, kind, 4, seed=1)).all() and (images == before).all()
    if kind in ("noise", "occlusion", "crop"):
        assert (first != corrupt(images, kind, 4, seed=2)).any()


def test_what_the_severities_say(images):
    side = images.shape[1]
    hidden = (corrupt(images, "occlusion", 5) == 128).all(axis=3).mean()
    assert hidden == pytest.approx(0.5, abs=0.03)
    flat = np.full((1, 200, 200, 3), 128, np.uint8)
    assert corrupt(flat, "noise", 2).astype(float).std() == pytest.approx(255 * 0.08, rel=0.02)
    ramp = np.arange(200, dtype=np.uint8)[None, :, None, None].repeat(200, axis=2).repeat(3, axis=3)
    assert np.ptp(corrupt(ramp, "crop", 5)) == pytest.approx(200 * 0.12**0.5, abs=2)
    edge = np.zeros((1, side, side, 3), np.uint8)
    edge[:, :, side // 2 :] = 255
    profile = corrupt(edge, "blur", 5)[0, 0, :, 0].astype(float)  # a normal distribution function
    x = np.arange(side) - side / 2 + 0.5
    spread = np.sqrt((np.gradient(profile / 255) * x**2).sum())
    assert spread == pytest.approx(0.08 * side, rel=0.1)


def test_bad_calls_are_named(images):
    with pytest.raises(ValueError, match="no corruption 'fog'"):
        corrupt(images, "fog", 1)
    with pytest.raises(ValueError, match="severity 6"):
        corrupt(images, "blur", 6)
    with pytest.raises(ValueError, match="float32"):
        corrupt(images.astype(np.float32), "blur", 1)
    assert corrupt(images[:0], "crop", 2).shape == (0, 48, 48, 3)


@pytest.mark.parametrize("name", OUT_OF_DISTRIBUTION)
def test_images_from_elsewhere(name):
    made = OUT_OF_DISTRIBUTION[name](9, 28, 3)
    assert made.shape == (9, 28, 28, 3) and made.dtype == np.uint8
    assert (made == OUT_OF_DISTRIBUTION[name](9, 28, 3)).all() and (
        made != OUT_OF_DISTRIBUTION[name](9, 28, 4)
    ).any()
    assert len(np.unique(made.reshape(9, -1), axis=0)) > 1
