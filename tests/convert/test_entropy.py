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


def header_is_read(data):
    try:
        jpeg.read_header(data)
        return True
    except jpeg.DamagedImage:
        return False


def passes(data):
    """As a conversion asks: libturbojpeg reads the header, `sound` the rest."""
    return header_is_read(data) and verdict(data)


def decodes(data):
    try:
        header = jpeg.read_header(data)
        jpeg._decompress(data, header, jpeg._PIXELS_RGB, eighths=8)
        return True
    except jpeg.DamagedImage:
        return False


def mutant(data, random):
    """A file with a bit or byte changed, bytes cut out or put in, or its end cut off; and what was done."""
    place = int(random.integers(2, len(data) if random.random() < 0.7 else min(700, len(data))))
    kind, count = int(random.integers(5)), int(random.integers(1, 9))
    damaged = bytearray(data)
    if kind == 0:
        damaged[place] ^= 1 << int(random.integers(8))
    elif kind == 1:
        damaged[place] = int(random.integers(256))
    elif kind == 2:
        del damaged[place : place + count]
    elif kind == 3:
        damaged[place:place] = random.bytes(count)
    else:
        del damaged[place:]
    return bytes(damaged), f"byte {place}, kind {kind}"


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
        damaged, how = mutant(data, random)
        ours, theirs = passes(damaged), decodes(damaged)
        assert theirs or not ours, how
        whole += ours
        same += ours == theirs
    assert whole > 50 and same > 1300, (whole, same)  # it isn't right by calling everything unsure


def test_together_the_verdicts_are_those_of_each_alone():
    """Whole, damaged and other files in any mix: none has an influence on its neighbours."""
    random = np.random.default_rng(3)
    whole = [
        encoded(noise(40 + 7 * i, 56, i), mode=mode, **options) for i, (mode, options) in enumerate(BASELINE)
    ]
    others = [b"", b"\xff\xd8", b"no image at all", encoded(pixels(30, 30), progressive=True)]
    for _ in range(60):
        files = [whole[int(random.integers(len(whole)))] for _ in range(int(random.integers(0, 12)))]
        files = [mutant(data, random)[0] if random.random() < 0.5 else data for data in files]
        files.insert(int(random.integers(len(files) + 1)), others[int(random.integers(len(others)))])
        assert sound(files) == [sound([data])[0] for data in files]
    assert sound([]) == []


@pytest.mark.skipif(jpeg.library() != "libturbojpeg", reason="libturbojpeg is not installed")
def test_a_table_with_a_code_of_ones_alone_does_not_pass():
    """Its codes are told apart by their first bits all the same, but libjpeg refuses it."""
    data = bytearray(encoded(pixels(40, 50)))
    table = data.index(b"\xff\xc4")
    length = int.from_bytes(data[table + 2 : table + 4], "big")
    counts = data[table + 5 : table + 21]
    place = max(i for i in range(16) if counts[i])
    data[table + 2 : table + 4] = (length + 1).to_bytes(2, "big")
    data[table + 5 + place] += 1
    data.insert(table + 21 + sum(counts), 11)
    assert not verdict(bytes(data)) and not decodes(bytes(data))


def test_more_restart_markers_than_there_is_room_for():
    """They are left to the decoder; the files beside them are not."""
    data = encoded(noise(600, 600), quality=80, subsampling="4:4:4", restart_marker_blocks=1)
    small = encoded(pixels(40, 40))
    assert sound([small, data, small]) == [True, False, True]
    jpeg.check(data, jpeg.read_header(data))
    assert jpeg.check_all([small, data, data[:-900]])[:2] == [None, None]
    assert jpeg.check_all([data[:-900]])[0]


def real_jpegs():
    tar = SHARED / "imagenet-sample/imagenet-1k-one-per-class.tar"
    if not tar.is_file():
        pytest.skip(f"no {tar}")
    with tarfile.open(tar) as archive:
        return [archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()]


def damaged_ones_do_not_pass(files, mutants, seed):
    random = np.random.default_rng(seed)
    passed = 0
    for start in range(0, len(files), 8):
        for _ in range(mutants):
            made = [mutant(data, random) for data in files[start : start + 8]]
            for (data, how), is_sound in zip(made, sound([data for data, _ in made])):
                is_sound = is_sound and header_is_read(data)
                passed += is_sound
                assert not is_sound or decodes(data), f"{how} of a file from {start} on, seed {seed}"
    return passed


@pytest.mark.skipif(jpeg.library() != "libturbojpeg", reason="libturbojpeg is not installed")
def test_real_jpegs():
    files = real_jpegs()[::10]
    assert all(
        sound(files[start : start + 8]) == [True] * len(files[start : start + 8])
        for start in range(0, 100, 8)
    )
    damaged_ones_do_not_pass(files, 5, seed=1)


@pytest.mark.slow
@pytest.mark.skipif(jpeg.library() != "libturbojpeg", reason="libturbojpeg is not installed")
@pytest.mark.parametrize("seed", range(10, 15))
def test_10000_damaged_real_jpegs_a_seed(seed):
    assert damaged_ones_do_not_pass(real_jpegs(), 10, seed) > 100
