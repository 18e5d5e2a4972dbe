"""A folder of everything that goes wrong with image files: each is stored right, or refused by its name."""

import io

import numpy as np
import pytest
from made_images import class_folders, decoded, encoded, image_of, pixels, with_orientation
from PIL import Image, ImageOps

from pipelines.convert.conversion import ConvertOptions, convert
from pipelines.formats.beton import JPEG, open_beton
from pipelines.formats.manifest import read_manifest


def sixteen_bit():
    out = io.BytesIO()
    Image.fromarray(np.arange(90 * 100, dtype=np.uint16).reshape(90, 100) * 7).save(out, "PNG")
    return out.getvalue()


GOOD = {
    "png named.jpg": encoded(pixels(80, 90, 1), "PNG"),
    "cmyk.jpg": encoded(pixels(80, 90, 2), mode="CMYK", quality=95),
    "one pixel.jpg": encoded(pixels(1, 1, 3)),
    "long.jpg": encoded(pixels(10, 20_000, 4)),
    "progressive.jpg": encoded(pixels(80, 90, 5), progressive=True),
    "turned.jpg": with_orientation(pixels(80, 90, 6), 6),
    "grey.jpg": encoded(pixels(80, 90, 7), mode="L"),
    "sixteen.png": sixteen_bit(),
    "transparent.webp": encoded(pixels(80, 90, 8), "WEBP", "RGBA", lossless=True),
    "animated.gif": encoded(pixels(80, 90, 9), "GIF"),
}
BAD = {"empty.jpg": b"", "text.jpg": b"this is no image\n" * 40, "html.jpg": b"<html>404</html>"}


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_each_is_stored_right_or_refused_by_name(tmp_path, options):
    whole = encoded(pixels(100, 120, 10), quality=90, **options)
    random = np.random.default_rng(0)
    cut = {f"cut {n}.jpg": whole[:n] for n in np.linspace(1, len(whole) - 3, 100).astype(int)}
    flipped = {}
    for i in range(100):
        data = bytearray(whole)
        data[int(random.integers(2, len(data)))] ^= int(random.integers(1, 256))
        flipped[f"flipped {i}.jpg"] = bytes(data)
    files = {f"c/{name}": data for name, data in {**GOOD, **BAD, **cut, **flipped}.items()}
    class_folders(tmp_path / "set", files)
    manifest = convert(str(tmp_path / "set"), tmp_path / "x.beton", options=ConvertOptions(workers=2))
    beton = open_beton(tmp_path / "x.beton")
    refused = {each["name"]: each["reason"] for each in manifest["refused"]}
    stored = dict(zip(read_manifest(tmp_path / "x.beton.json")[1]["name"], range(beton.count)))
    assert set(refused) | set(stored) == set(files) and not set(refused) & set(stored)
    assert all(reason and "\n" not in reason for reason in refused.values())
    assert {f"c/{name}" for name in (*BAD, *cut)} <= set(refused)
    assert {f"c/{name}" for name in GOOD} <= set(stored)
    for name in stored:
        index = stored[name]
        data = image_of(beton, index)
        if name.startswith("c/flipped"):  # where no decoder can tell, its bytes are kept
            assert data == files[name]
            continue
        file = Image.open(io.BytesIO(files[name]))
        if name == "c/sixteen.png":
            wanted = np.repeat((np.asarray(file).astype(int) // 257)[..., None], 3, 2)
        else:
            wanted = np.asarray(ImageOps.exif_transpose(file).convert("RGB")).astype(int)
        height, width = int(beton.heights[index]), int(beton.widths[index])
        if beton.modes[index] == JPEG:
            got = decoded(data)
        else:
            got = np.frombuffer(data, np.uint8).reshape(height, width, 3)
        assert got.shape == (height, width, 3) == wanted.shape, name
        assert np.abs(got.astype(int) - wanted).mean() < 4, name
