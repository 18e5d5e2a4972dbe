"""The fast check against libturbojpeg: what it calls sound, the decoder reads without a warning."""

import tarfile

import numpy as np
import pytest
from made_images import SHARED, encoded, pixels

from pipelines.convert import jpeg
from pipelines.convert.entropy import sound

BASELINE = [
    ("RGB", {"quality": 80}),
    ("RGB", {"quality": 100, "subsampling": "4:4:4"}),  # long codes
    ("RGB", {"quality": 75, "subsampling": "4:2:2"}),
    ("RGB", {"quality": 5}),
    ("RGB", {"quality": 90, "optimize": True}),  # Huffman tables of its own
    ("RGB", {"quality": 80, "restart_marker_blocks": 2}),
    ("RGB", {"quality": 80, "keep_rgb": True}),
    ("L", {"quality": 80}),
    ("L", {"quality": 100, "optimize": True, "restart_marker_rows": 1}),
]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def verdict(data):
    return sound([data])[0]


def passes(data):
    """As a conversion asks: libturbojpeg reads the header, `sound` the rest."""
    try:
        jpeg.read_header(data)
        return verdict(data)
    except jpeg.DamagedImage:
        return False


def decodes(data):
    try:
        header = jpeg.read_header(data)
        jpeg._decompress(data, header, jpeg._PIXELS_RGB, eighths=8)
        return True
    except jpeg.DamagedImage:
        return False


@pytest.mark.parametrize(("mode", "options"), BASELINE)
@pytest.mark.parametrize("make", [pixels, noise])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 33), (100, 75)])
def test_a_sound_baseline_jpeg_is_known_at_once(mode, options, make, size):
    data = encoded(make(*size), mode=mode, **options)
    assert verdict(data)
    assert verdict(data + b"behind its end")


@pytest.mark.parametrize(("mode", "options"), [("RGB", {"progressive": True}), ("CMYK", {})])
def test_other_jpegs_are_left_to_the_decoder(mode, options):
    assert not verdict(encoded(pixels(40, 50), mode=mode, **options))


@pytest.mark.skipif(jpeg.library() != "libturbojpeg", reason="libturbojpeg is not installed")
@pytest.mark.parametrize(("mode", "options"), BASELINE)
def test_what_is_sound_to_it_is_sound_to_libturbojpeg(mode, options):
    """Flipped bits, bytes, cuts and insertions anywhere in the file, headers as well."""
    random = np.random.default_rng(0)
    data = encoded(noise(40, 56), mode=mode, **options)
    whole = same = 0
    for _ in range(1500):
        damaged = bytearray(data)
        place = int(random.integers(2, len(data) if random.random() < 0.7 else min(700, len(data))))
        kind = random.integers(4)
        if kind == 0:
            damaged[place] ^= 1 << int(random.integers(8))
        elif kind == 1:
            damaged[place] = int(random.integers(256))
        elif kind == 2:
            del damaged[place : place + int(random.integers(1, 9))]
        else:
            damaged[place:place] = random.bytes(int(random.integers(1, 9)))
        ours, theirs = passes(bytes(damaged)), decodes(bytes(damaged))
        assert theirs or not ours, f"byte {place}, kind {kind}"
        whole += ours
        same += ours == theirs
    assert whole > 50 and same > 1300, (whole, same)  # it isn't right by calling everything unsure


@pytest.mark.skipif(jpeg.library() != "libturbojpeg", reason="libturbojpeg is not installed")
def test_real_jpegs():
    tar = SHARED / "imagenet-sample/imagenet-1k-one-per-class.tar"
    if not tar.is_file():
        pytest.skip(f"no {tar}")
    with tarfile.open(tar) as archive:
        files = [archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()][::10]
    assert all(verdict(data) for data in files)
    random = np.random.default_rng(1)
    for data in files:
        for _ in range(5):
            damaged = bytearray(data)
            damaged[int(random.integers(3, len(data)))] ^= int(random.integers(1, 256))
            assert decodes(bytes(damaged)) or not passes(bytes(damaged))
