"""The check of a JPEG, which decodes to an eighth of the size: it finds what decoding all of it finds."""

import tarfile

import numpy as np
import pytest
from made_images import SHARED, encoded, pixels

from pipelines.convert.store import Settings, store_batch
from pipelines.formats import jpeg, turbojpeg

needs_libturbojpeg = pytest.mark.skipif(
    jpeg.library() != "libturbojpeg", reason="libturbojpeg is not installed"
)
KINDS = [
    ("RGB", {"quality": 80}),
    ("RGB", {"quality": 100, "subsampling": "4:4:4"}),  # long codes
    ("RGB", {"quality": 75, "subsampling": "4:2:2"}),
    ("RGB", {"quality": 5}),
    ("RGB", {"quality": 90, "optimize": True}),  # Huffman tables of its own
    ("RGB", {"quality": 80, "restart_marker_blocks": 2}),
    ("RGB", {"quality": 80, "keep_rgb": True}),
    ("RGB", {"quality": 90, "progressive": True}),
    ("L", {"quality": 80}),
    ("L", {"quality": 100, "optimize": True, "restart_marker_rows": 1}),
]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def passes(data):
    """As a conversion asks: the header, and the check."""
    try:
        jpeg.check(data, jpeg.read_header(data))
        return True
    except jpeg.DamagedImage:
        return False


def decodes(data):
    try:
        header = jpeg.read_header(data)
        jpeg._decompress(data, header, turbojpeg.RGB, eighths=8)
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


@pytest.mark.parametrize(("mode", "options"), KINDS)
@pytest.mark.parametrize("make", [pixels, noise])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 33), (100, 75)])
def test_a_whole_jpeg_passes(mode, options, make, size):
    data = encoded(make(*size), mode=mode, **options)
    assert passes(data)
    assert passes(data + b"behind its end")


@needs_libturbojpeg
@pytest.mark.parametrize(("mode", "options"), KINDS)
def test_it_passes_what_a_full_decode_passes(mode, options):
    """Flipped bits, bytes, cuts and insertions anywhere in the file, headers as well."""
    random = np.random.default_rng(0)
    data = encoded(noise(40, 56), mode=mode, **options)
    whole = 0
    for _ in range(1500):
        damaged, how = mutant(data, random)
        ours = passes(damaged)
        assert ours == decodes(damaged), how
        whole += ours
    assert 50 < whole < 900, whole  # neither all nor none


def test_the_verdict_on_a_file_has_no_influence_on_the_next():
    """Whole, damaged and other files in any order, as a thread of a conversion meets them."""
    random = np.random.default_rng(3)
    whole = [
        encoded(noise(40 + 7 * i, 56, i), mode=mode, **options) for i, (mode, options) in enumerate(KINDS)
    ]
    others = [b"", b"\xff\xd8", b"no image at all", encoded(pixels(80, 90), "PNG")]
    files = [whole[int(random.integers(len(whole)))] for _ in range(300)]
    files = [mutant(data, random)[0] if random.random() < 0.5 else data for data in files]
    files = [each for data in files for each in (data, others[int(random.integers(len(others)))])]

    class Files:
        read = files.__getitem__

    together = store_batch(Files, range(len(files)), Settings(), as_png=False)
    for index in random.permutation(len(files)):
        assert store_batch(Files, [int(index)], Settings(), as_png=False) == [together[index]]
    refused = sum(isinstance(each, str) for each in together)
    assert 300 < refused < 500  # half of the JPEGs are whole, and a quarter of the other files


@needs_libturbojpeg
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
    assert not passes(bytes(data))


def test_a_restart_marker_behind_every_block():
    data = encoded(noise(600, 600), quality=80, subsampling="4:4:4", restart_marker_blocks=1)
    assert passes(data) and not passes(data[:-900])


def real_jpegs():
    tar = SHARED / "imagenet-sample/imagenet-1k-one-per-class.tar"
    if not tar.is_file():
        pytest.skip(f"no {tar}")
    with tarfile.open(tar) as archive:
        return [archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()]


def number_that_passes(files, mutants, seed):
    """Of so many mutants of each file, as many pass as a full decode passes, and these."""
    random = np.random.default_rng(seed)
    passed = 0
    for number, data in enumerate(files):
        for _ in range(mutants):
            damaged, how = mutant(data, random)
            whole = passes(damaged)
            assert whole == decodes(damaged), f"{how} of file {number}, seed {seed}"
            passed += whole
    return passed


@needs_libturbojpeg
def test_real_jpegs():
    files = real_jpegs()[::10]
    assert all(map(passes, files))
    number_that_passes(files[::2], 5, seed=1)


@pytest.mark.slow
@needs_libturbojpeg
@pytest.mark.parametrize("seed", range(10, 15))
def test_10000_damaged_real_jpegs_a_seed(seed):
    assert number_that_passes(real_jpegs(), 10, seed) > 100
