"""Images as other programs leave them: broken metadata, damaged headers, samples of more than 8 bits."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from made_images import class_folders, decoded, encoded, image_of, photos, pixels
from PIL import Image

from pipelines.convert import store
from pipelines.convert.command import main
from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.decode import DamagedSample
from pipelines.decode.images import ImageReader
from pipelines.decode.pixels import decode_rgb
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.formats.beton import RAW, open_beton
from pipelines.formats.manifest import read_manifest

KINDS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG")
SMALL = pixels(40, 50, 1)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks behind its IHDR."""
    return data[:33] + b"".join(chunks) + data[33:]


def webp_with_exif(block: bytes) -> bytes:
    data = bytearray(encoded(SMALL, "WEBP", lossless=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"))
    at = data.index(b"EXIF")
    body = block + b"\0" * (len(block) % 2)
    data[at:] = b"EXIF" + struct.pack("<I", len(block)) + body
    data[4:8] = struct.pack("<I", len(data) - 8)
    return bytes(data)


def jpeg_with_exif(block: bytes) -> bytes:
    data = encoded(SMALL, quality=95)
    segment = b"Exif\0\0" + block
    return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + data[2:]


BLOCKS = (b"", b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\xff" + b"\x01\x12\0\x63" * 3)


def with_broken_exif() -> dict[str, bytes]:
    files = {}
    for i, block in enumerate(BLOCKS):
        files[f"a/{i}.png"] = png_with(encoded(SMALL, "PNG"), chunk(b"eXIf", block))
        files[f"a/{i}.webp"] = webp_with_exif(block)
        files[f"a/{i}.jpg"] = jpeg_with_exif(block)
    return files


def test_broken_metadata_leaves_the_pixels_alone(tmp_path):
    files = class_folders(tmp_path / "set", with_broken_exif())
    manifest = convert(str(files), tmp_path / "x.beton")
    assert manifest["refused"] == [] and manifest["count"] == 12
    beton = open_beton(tmp_path / "x.beton")
    for i, name in enumerate(read_manifest(tmp_path / "x.beton.json")[1]["name"]):
        data = image_of(beton, i)
        raw = beton.modes[i] == RAW
        found = np.frombuffer(data, np.uint8).reshape(40, 50, 3) if raw else decoded(data)
        assert np.abs(found.astype(int) - SMALL).max() <= (0 if raw else 12), name
        assert np.abs(decode_rgb(files / name).astype(int) - SMALL).max() <= (0 if raw else 12), name
    source = ImageReader(files)
    assert {tuple(map(int, size)) for size in zip(*source.sizes(np.arange(12)))} == {(40, 50)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_header_is_a_refusal_of_that_image_by_name(tmp_path, kind):
    """Whatever Pillow raises. Of 150 damaged files, each is read or refused, alike by all who read images."""
    whole, random = encoded(SMALL, kind), np.random.default_rng(3)
    files = {}
    for i in range(150):
        data = bytearray(whole)
        places = random.integers(3, min(200, len(data)), random.integers(1, 4))
        for place in places.tolist():
            data[place] = random.integers(256)
        files[f"a/{i:03}.{kind.lower()}"] = bytes(data[: random.integers(4, 300)] if i % 5 == 0 else data)
    files["a/whole." + kind.lower()] = whole
    folder = class_folders(tmp_path / "set", files)
    manifest = convert(str(folder), tmp_path / "x.beton", options=ConvertOptions(workers=1))
    refused = {each["name"]: each["reason"] for each in manifest["refused"]}
    assert manifest["count"] + len(refused) == 151 and "a/whole." + kind.lower() not in refused
    assert len(refused) > 20 and all(why and "\n" not in why for why in refused.values())
    source, out = ImageReader(folder), np.empty((1, 1, 8, 8, 3), np.uint8)
    for i, name in enumerate(source.names):
        try:
            decode_rgb(folder / name)
        except InputError as error:
            assert name in refused and name in str(error)
        try:
            source.sizes(np.array([i]))
            source.crops(np.array([i]), np.array([[[0, 0, 1, 1]]], np.int32), out)
        except DamagedSample as error:
            assert name in refused and name in str(error)


def test_whatever_a_decoder_raises_is_refused_by_name(tmp_path, monkeypatch):
    folder = photos(tmp_path / "set", classes=1, each=3)
    real = store.store

    def fails(image, settings, index=0):
        if index == 1:
            raise RecursionError
        return real(image, settings, index)

    monkeypatch.setattr(store, "store", fails)
    manifest = convert(str(folder), tmp_path / "x.beton")
    assert manifest["refused"] == [{"name": "class0/001.jpg", "reason": "RecursionError"}]


def test_what_was_opened_before_does_not_decide_what_an_image_is(monkeypatch):
    """Pillow tries the formats in the order in which they were loaded, and TGA, which has no signature, takes
    this icon for its own."""
    noise = np.random.default_rng(0).integers(0, 256, (170, 170, 3), np.uint8)
    icon = encoded(noise, "ICO", sizes=[(170, 170)])
    Image.init()
    monkeypatch.setattr(Image, "ID", ["TGA", *(name for name in Image.ID if name != "TGA")])
    assert Image.open(io.BytesIO(icon)).format == "TGA"
    assert np.array_equal(decode_rgb(icon), noise)
    assert np.array_equal(decode_rgb(encoded(noise, "TGA")), noise)


def test_no_other_program_is_run_for_an_image():
    with pytest.raises(InputError, match="EPS needs Ghostscript.*save it as PNG"):
        decode_rgb(encoded(SMALL, "EPS"))


def test_decoders_say_nothing_raw(tmp_path):
    """In a process of its own, for pytest catches warnings itself."""
    apng = png_with(encoded(SMALL, "PNG"), *[chunk(b"acTL", struct.pack(">II", 1, 0))] * 2)
    files = {"a/apng.png": apng, "a/deep.png": deep_png(COLOUR12, chunk(b"sBIT", b"\x0c" * 3))}
    files["a/tags.tif"] = encoded(SMALL, "TIFF").replace(
        struct.pack("<HHI", 256, 4, 1), struct.pack("<HHI", 999, 2, 9999), 1
    )
    folder = class_folders(tmp_path / "set", files)
    warn = ["-W", "always", "-W", "ignore::ResourceWarning"]
    command = [*warn, "-m", "tools.convert_beton", str(folder), f"{tmp_path}/x.beton"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(apng))


def test_bitmaps_of_few_colours_are_line_art(tmp_path):
    drawing = np.where(np.random.default_rng(0).random((90, 100)) < 0.5, 0, 255).astype(np.uint8)
    for data in (encoded(drawing, "BMP", mode="1"), encoded(drawing, "PNG", mode="1")):
        stored = store.store(data, Settings())
        assert stored.storage_kind == "raw"
        assert np.array_equal(np.frombuffer(stored.data, np.uint8).reshape(90, 100, 3)[..., 0], drawing)
    assert store.store(encoded(pixels(90, 100, 1), "BMP"), Settings()).storage_kind == "reencoded"


# ------------------------------------------------------------------- more than 8 bits


def deep_png(values: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG of 16 bits a sample, grey [H, W] or RGB [H, W, 3]."""
    colour = 0 if values.ndim == 2 else 2
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: np.ndarray, **tags) -> bytes:
    return encoded(values, "TIFF", mode=Image.fromarray(values).mode, **tags)


def scaled(values: np.ndarray, white: int) -> np.ndarray:
    grey = np.rint(values * (255 / white)).astype(int)
    return np.repeat(grey[..., None], 3, 2) if grey.ndim == 2 else grey


GREY8 = pixels(40, 50, 5)[..., 0].astype(np.int32)
COLOUR8 = pixels(40, 50, 5).astype(np.int32)
GREY12 = GREY8 * 16 + GREY8 // 16  # 12 bits: 0..4095
COLOUR12 = COLOUR8 * 16 + COLOUR8 // 16


def range_tags(low: int, high: int) -> Image.Exif:
    tags = Image.Exif()
    tags[340], tags[341] = low, high
    return tags


@pytest.mark.parametrize(
    ("data", "values", "white"),
    [
        (tiff(GREY8, tiffinfo=range_tags(0, 255)), GREY8, 255),
        (tiff(GREY12.astype(np.uint16), tiffinfo=range_tags(0, 4095)), GREY12, 4095),
        (tiff((GREY12 + 500).astype(np.uint16), tiffinfo=range_tags(500, 4595)), GREY12, 4095),
        (deep_png(GREY12, chunk(b"sBIT", b"\x0c")), GREY12, 4095),
        (deep_png(COLOUR12, chunk(b"sBIT", b"\x0c" * 3)), COLOUR12, 4095),
        (deep_png(GREY12 * 16, chunk(b"sBIT", b"\x0c")), GREY12 * 16, 65520),  # as the standard has it
        (deep_png(GREY12 // 16 * 16, chunk(b"sBIT", b"\x0c")), GREY12 // 16 * 16, 65535),  # dark
        (deep_png(GREY8 * 257), GREY8, 255),
        (deep_png(COLOUR8 * 257), COLOUR8, 255),
        (encoded(pixels(40, 50, 5), "PPM", mode="L").replace(b"255\n", b"250\n", 1), GREY8, 250),
    ],
    ids=[
        "tiff32",
        "tiff12",
        "tiff12-black",
        "sbit",
        "sbit-colour",
        "sbit-standard",
        "sbit-dark",
        "full",
        "colour",
        "pgm",
    ],
)
def test_the_file_says_which_value_is_white(data, values, white):
    if white == 250:
        values = np.minimum(decoded(encoded(pixels(40, 50, 5), "PPM", mode="L"))[..., 0].astype(int), 250)
    assert np.abs(decode_rgb(data).astype(int) - scaled(values, white)).max() <= 1


@pytest.mark.parametrize(
    ("data", "level"),
    [
        (tiff(GREY8), 255),
        (deep_png(GREY12), 4095),
        (deep_png(COLOUR12), 4095),
        (tiff(GREY12.astype(np.uint16)), 4095),
        (encoded((GREY8 / 255).astype(np.float32), "TIFF", mode="F"), None),
    ],
    ids=["tiff32", "png", "png-colour", "tiff16", "float"],
)
def test_what_would_come_out_black_is_refused_or_scaled_as_stated(tmp_path, capsys, data, level):
    class_folders(tmp_path / "set", {"a/x.tif": data, "a/plain.png": encoded(SMALL, "PNG")})
    typed = [str(tmp_path / "set"), str(tmp_path / "x.beton")]
    assert main(typed) == 0
    said = capsys.readouterr().err
    assert "skipped a/x.tif" in said
    if level is None:
        assert "no known range" in said
        return
    assert f"--white-level {level} or 65535" in said
    assert main([*typed, "--overwrite", "--white-level", str(level)]) == 0
    manifest, rows = read_manifest(tmp_path / "x.beton.json")
    assert manifest["settings"]["white_level"] == level and manifest["count"] == 2
    beton, index = open_beton(tmp_path / "x.beton"), rows["name"].index("a/x.tif")
    found = np.frombuffer(image_of(beton, index), np.uint8).reshape(40, 50, 3).astype(int)
    wanted = scaled(COLOUR8 if b"\x10\x02" in data[24:26] else GREY8, 255)
    assert np.abs(found - wanted).max() <= 1
    assert main([*typed, "--overwrite", "--white-level", "7"]) == 0
    assert "beyond 0 to 7" in capsys.readouterr().err  # never clipped


def test_a_jpeg_too_dense_to_be_read_is_encoded_again(monkeypatch):
    """Of arithmetic codes, which take a fraction of a bit for a blank block; readers take it for damaged."""
    monkeypatch.setenv("TJ_ARITHMETIC", "1")
    dense = jpeg.encode(np.full((600, 800, 3), 255, np.uint8), 90)
    monkeypatch.delenv("TJ_ARITHMETIC")
    if b"\xff\xc9" not in dense:
        pytest.skip("this libjpeg-turbo doesn't write arithmetic codes")
    stored = store.store(dense, Settings())
    assert stored.storage_kind == "reencoded" and len(stored.data) * jpeg.PIXELS_PER_BYTE > 600 * 800
    assert (decode_rgb(bytes(stored.data)) == 255).all()


def test_a_deep_tiff_in_which_zero_is_white_is_no_negative():
    """Pillow inverts such TIFFs of 8 bits, and not of more."""
    zero_is_white = Image.Exif()
    zero_is_white[262] = 0
    stored = (65_535 - GREY8 * 257).astype(np.uint16)
    for data in (tiff(stored, tiffinfo=zero_is_white), tiff(GREY8.astype(np.uint8), tiffinfo=zero_is_white)):
        assert np.abs(decode_rgb(data).astype(int) - scaled(GREY8, 255)).max() <= 1


def test_a_white_level_out_of_range_is_refused():
    with pytest.raises(InputError, match="--white-level 0: must be within 1"):
        Settings(white_level=0).check()


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)], ids=["grey", "colour"])
def test_a_png_of_sixteen_bits_may_be_black_altogether(shape):
    black = np.zeros(shape, np.uint16)
    assert not decode_rgb(deep_png(black)).any()
    black[0, 0] = 200  # nothing of it is in the upper eight bits
    with pytest.raises(InputError, match="16-bit values end at 200.*--white-level 255 or 65535"):
        decode_rgb(deep_png(black))


def test_sixteen_bits_that_are_all_used_need_no_white_level():
    dark = np.full((40, 50), 20_000, np.uint16)
    assert np.array_equal(np.unique(decode_rgb(deep_png(dark))), [78])
    with pytest.raises(jpeg.DamagedImage, match="16-bit values end at 9,000"):
        store.store(deep_png(dark * 0 + 9_000), Settings())
