"""Images of other channels than RGB: each is read as documented, or refused in one line that names it."""

import struct

import numpy as np
import PIL
import pytest
from made_images import decoded, encoded, pixels
from PIL import Image

from lvssl.commands.main import main as lvssl
from pipelines.convert.command import main as convert
from pipelines.decode.pixels import decode_rgb
from pipelines.errors import InputError

OLD = int(PIL.__version__.split(".")[0]) < 13

H, W = 20, 24
SMALL = pixels(H, W, 1)


def tiff(bands: int, photometric: int, extra: list[int], bits: int = 8, order: str = "<") -> bytes:
    """A TIFF of so many interleaved bands; `extra`: what its ExtraSamples tag says of those beyond colour."""
    values = np.arange(H * W * bands).reshape(H, W, bands) % 251
    data = values.astype(f"{order}u{bits // 8}").tobytes()
    shorts = {256: [W], 257: [H], 258: [bits] * bands, 259: [1], 262: [photometric], 277: [bands], 278: [H]}
    shorts |= {284: [1]} | ({338: extra} if extra else {})
    at, behind, entries = 8 + 2 + 12 * (len(shorts) + 2) + 4, b"", {}
    for tag, numbers in shorts.items():
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            packed, behind = struct.pack(f"{order}I", at + len(behind)), behind + packed
        entries[tag] = struct.pack(f"{order}HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    entries[273] = struct.pack(f"{order}HHII", 273, 4, 1, at + len(behind))
    entries[279] = struct.pack(f"{order}HHII", 279, 4, 1, len(data))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4) + behind + data


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", mode) for mode in ("L", "CMYK", "YCbCr")]
    + [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA")]
    + [("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK")]
    + [
        pytest.param(
            "TIFF", "YCbCr", marks=pytest.mark.skipif(OLD, reason="Pillow below 13 can't read these")
        )
    ],
)
def test_other_colours_become_rgb(kind, mode):
    data = encoded(SMALL, kind, mode)
    assert np.array_equal(decode_rgb(data), decoded(data))


@pytest.mark.parametrize("extra", [[], [2]], ids=["unnamed", "named"])
def test_alpha_is_dropped(extra):
    rgb = (np.arange(H * W * 4).reshape(H, W, 4) % 251)[..., :3]
    assert np.array_equal(decode_rgb(tiff(4, 2, extra)), rgb)


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("bands", "photometric", "extra"),
    [
        (2, 1, [0]),
        (3, 1, [0, 0]),
        (4, 2, [0]),
        (4, 1, [0] * 3),
        (5, 2, [0, 0]),
        (5, 2, [2, 0]),
        (5, 5, [0]),
        (8, 1, [0] * 7),
    ],
)
def test_further_channels_are_refused(bands, photometric, extra, bits, order):
    with pytest.raises(InputError, match=f"a TIFF of {bands} channels: images are grey or RGB"):
        decode_rgb(tiff(bands, photometric, extra, bits, order), "field.tif")


def test_a_big_tiff_is_looked_at_too():
    plain, channels = tiff(3, 2, []), tiff(5, 2, [0, 0])
    for data, bands in ((plain, 3), (channels, 5)):
        count = struct.unpack("<H", data[8:10])[0]
        entries = [data[10 + 12 * i : 22 + 12 * i] for i in range(count)]
        shift = (16 + 8 + 20 * count + 8) - (8 + 2 + 12 * count + 4)
        big = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, count)
        for entry in entries:
            tag, kind, number, value = struct.unpack("<HHII", entry)
            if tag == 273 or (kind == 3 and number > 4):
                value += shift
            inline = entry[8:].ljust(8, b"\0")
            if tag == 258 and bands == 3:
                inline = struct.pack("<HHH", 8, 8, 8).ljust(8, b"\0")
            elif tag in (273, 279) or number > 2:
                inline = struct.pack("<Q", value)
            big += struct.pack("<HHQ", tag, kind, number) + inline
        big += bytes(8) + data[8 + 2 + 12 * count + 4 :]
        if bands == 3:
            assert np.array_equal(decode_rgb(big), decode_rgb(plain))
        else:
            with pytest.raises(InputError, match="a TIFF of 5 channels"):
                decode_rgb(big)


def test_every_command_names_the_file(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        Image.fromarray(pixels(H, W, i)).save(photos / f"{i}.png")
    (photos / "field.tif").write_bytes(tiff(4, 2, [0]))
    run = ["pretrain", "--data", str(photos), "--out", str(tmp_path / "run"), "--device", "cpu"]
    run += ["--backbone", "tiny", "--resolution", "16", "--batch-size", "4", "--epochs", "1", "--hidden", "8"]
    for command in (
        lambda: convert([str(photos), str(tmp_path / "x.beton"), "--on-error", "raise"]),
        lambda: lvssl(run),
    ):
        assert command() == 2
        said = capsys.readouterr().err
        assert "field.tif" in said and "a TIFF of 4 channels" in said and "save three of the channels" in said


def test_arrays_are_no_images(tmp_path, capsys):
    (tmp_path / "stacks").mkdir()
    np.save(tmp_path / "stacks/x.npy", np.zeros((H, W, 5), np.uint8))
    for command in (convert, lambda arguments: lvssl(["pretrain", "--data", *arguments[:1]])):
        assert command([str(tmp_path / "stacks"), str(tmp_path / "x.beton")]) == 2
        assert "arrays (.npy) aren't read: save them as PNG" in capsys.readouterr().err
    with pytest.raises(InputError, match="x.npy: .*a NumPy array, no image file: save its images as PNG"):
        decode_rgb(tmp_path / "stacks/x.npy")
