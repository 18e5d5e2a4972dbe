"""What becomes of one image, of a whole set, and of damage."""

import hashlib
import io
import json

import numpy as np
import pytest
from made_images import class_folders, decoded, encoded, image_of, photos, pixels, with_orientation
from PIL import Image, ImageDraw, ImageOps

from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.convert.store import area_resize, chosen_raw, select, store
from pipelines.decode.pixels import decode_rgb
from pipelines.errors import InputError
from pipelines.formats import jpeg
from pipelines.formats.beton import JPEG, RAW, open_beton

AS_IS = Settings()


def apart(a, b) -> float:
    """Mean absolute difference in levels."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


# ------------------------------------------------------------------ one image


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"quality": 80}),
        ("RGB", {"quality": 80, "progressive": True}),
        ("RGB", {"quality": 100, "subsampling": "4:4:4"}),
        ("RGB", {"quality": 80, "restart_marker_blocks": 2}),
        ("RGB", {"quality": 80, "keep_rgb": True}),
        ("L", {"quality": 80}),
        ("L", {"quality": 80, "progressive": True}),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (100, 75)])
def test_a_jpeg_keeps_its_bytes(mode, options, size):
    data = encoded(pixels(*size), mode=mode, **options)
    stored = store(data, Settings(max_resolution=100))
    assert (stored.mode, stored.data, stored.storage_kind) == (JPEG, data, "jpeg_untouched")
    assert (stored.height, stored.width) == size


def test_a_jpeg_with_exif_and_bytes_behind_its_end_keeps_them():
    data = with_orientation(pixels(40, 30), 1) + b"what some cameras append"
    assert store(data, AS_IS).data == data


def test_cmyk_is_stored_as_rgb():
    data = encoded(pixels(50, 60), mode="CMYK", quality=95)
    stored = store(data, AS_IS)
    assert (stored.mode, stored.storage_kind, stored.height, stored.width) == (JPEG, "reencoded", 50, 60)
    assert jpeg.read_header(data).colour in ("CMYK", "YCCK")
    assert jpeg.read_header(stored.data).colour == "YCbCr"
    assert apart(decoded(stored.data), decoded(data)) < 3


@pytest.mark.parametrize(("size", "limit", "expected"), [
    ((300, 200), 100, (100, 66)),
    ((200, 300), 299, (199, 299)),
    ((20, 2000), 100, (1, 100)),
    ((2000, 1), 50, (50, 1)),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_image_is_shrunk_by_area(size, limit, expected, kind):
    image = pixels(*size)
    data = encoded(image, kind, **({"quality": 95} if kind == "JPEG" else {}))
    stored = store(data, Settings(max_resolution=limit, jpeg_quality=95))
    assert (stored.height, stored.width) == expected
    small = stored.data if stored.mode == JPEG else None
    got = decoded(small) if small else np.frombuffer(stored.data, np.uint8).reshape(*expected, 3)
    assert apart(got, exact_area(image, *expected)) < 3


def exact_area(image, height, width):
    """Mean over covered area in float64: coverage matrices, row by row."""

    def coverage(old, new):
        edges = np.arange(new + 1) * old / new
        left, right = (
            np.maximum(edges[:-1, None], np.arange(old)),
            np.minimum(edges[1:, None], np.arange(old) + 1),
        )
        return np.clip(right - left, 0, None) * new / old

    rows, columns = coverage(image.shape[0], height), coverage(image.shape[1], width)
    return np.rint(np.einsum("xw,ywc->yxc", columns, np.tensordot(rows, image.astype(float), 1)))


@pytest.mark.parametrize("size", [(7, 5), (64, 64), (61, 47), (100, 1), (1, 100)])
@pytest.mark.parametrize("target", [(1, 1), (3, 5), (7, 4), (33, 47)])
def test_area_resize_equals_the_exact_mean(size, target):
    height, width = min(size[0], target[0]), min(size[1], target[1])
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)  # nothing smooth to hide behind
    off = np.abs(area_resize(noise, height, width).astype(int) - exact_area(noise, height, width))
    assert (
        off.max() <= 1 and (off > 0).sum() <= 1 + off.size // 100
    )  # in float32 a tie may round the other way


MODES = {"PNG": "RGB L RGBA P 1", "WEBP": "RGB L RGBA P", "BMP": "RGB L P 1", "GIF": "RGB L P 1"}
MODES |= {"TIFF": "RGB L RGBA P 1", "PPM": "RGB L"}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind].split()])
def test_small_lossless_images_become_raw_pixels(kind, mode):
    data = encoded(pixels(12, 9), kind, mode, **({"lossless": True} if kind == "WEBP" else {}))
    stored = store(data, AS_IS)
    assert (stored.mode, stored.storage_kind, stored.height, stored.width) == (RAW, "raw", 12, 9)
    assert np.array_equal(np.frombuffer(stored.data, np.uint8).reshape(12, 9, 3), decoded(data))


def test_large_lossless_images_become_jpegs_unless_raw_is_asked_for():
    image = pixels(65, 64)
    stored = store(encoded(image, "PNG"), Settings(jpeg_quality=95))
    assert (stored.mode, stored.storage_kind) == (JPEG, "reencoded") and apart(
        decoded(stored.data), image
    ) < 2
    stored = store(encoded(image, "PNG"), Settings(raw_proportion=1))
    assert stored.mode == RAW and stored.data == image.tobytes()
    assert store(encoded(pixels(64, 64), "PNG"), AS_IS).mode == RAW


def test_raw_stores_the_pixels_of_jpegs():
    data = encoded(pixels(30, 40), quality=90)
    stored = store(data, Settings(raw_proportion=1))
    assert (stored.mode, stored.height, stored.width) == (RAW, 30, 40)
    assert apart(np.frombuffer(stored.data, np.uint8).reshape(30, 40, 3), decoded(data)) < 1


def test_a_proportion_of_the_images_is_stored_raw_whatever_their_order():
    def drawn(seed: int | None) -> list[bool]:
        settings = Settings(raw_proportion=0.3, shuffle_seed=seed)
        return [chosen_raw(settings, index) for index in range(3000)]

    assert drawn(1) != drawn(None) == drawn(0)
    for seed in range(5):
        assert abs(np.mean(drawn(seed)) - 0.3) < 3 * (0.3 * 0.7 / 3000) ** 0.5


def test_sixteen_bits_become_eight():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "PNG")
    stored = store(out.getvalue(), AS_IS)
    assert np.array_equal(np.frombuffer(stored.data, np.uint8).reshape(16, 16, 3)[..., 1], grey // 257)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_is_applied(orientation, kind):
    data = with_orientation(pixels(80, 72), orientation, kind)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert apart(decode_rgb(data), upright) < 1
    stored = store(data, Settings(jpeg_quality=95))
    assert stored.exif_rotated == (orientation != 1)
    assert (stored.height, stored.width) == upright.shape[:2]
    assert apart(decoded(stored.data), upright) < 3
    if kind == "JPEG":
        assert stored.storage_kind == ("jpeg_untouched" if orientation == 1 else "reencoded")


def test_fill_bytes_before_a_marker_hide_no_orientation():
    data = with_orientation(pixels(80, 72), 6)
    filled = data[:2] + b"\xff" * 3 + data[2:]  # as ITU-T T.81, B.1.1.2, allows
    assert Image.open(io.BytesIO(filled)).getexif()[0x0112] == 6
    assert store(filled, AS_IS).exif_rotated
    assert np.array_equal(decode_rgb(filled), decode_rgb(data))


def test_arrays_are_stored_as_they_are():
    grey, colour = pixels(28, 28)[..., 0], pixels(32, 32)
    assert store(grey, AS_IS).data == np.stack([grey] * 3, -1).tobytes()
    assert store(colour, AS_IS).data == colour.tobytes()


def test_sides_beyond_the_format_are_refused_and_shrunk_on_request():
    data = encoded(np.zeros((1, 70_000, 3), np.uint8), "PNG")
    with pytest.raises(jpeg.DamagedImage, match=r"70000 x 1 is too large.*--max-resolution"):
        store(data, AS_IS)
    assert (
        store(data, Settings(max_resolution=50)).height,
        store(data, Settings(max_resolution=50)).width,
    ) == (1, 50)
    long = store(encoded(pixels(10, 20_000)), AS_IS)
    assert (long.storage_kind, long.height, long.width) == ("jpeg_untouched", 10, 20_000)


# --------------------------------------------------------------------- damage


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_truncated_jpeg_is_refused_wherever_it_ends(options):
    data = encoded(pixels(90, 120), quality=90, **options)
    for length in [*range(0, 40), *np.linspace(40, len(data) - 2, 100).astype(int)]:
        with pytest.raises(jpeg.DamagedImage):
            store(data[:length], AS_IS)


def test_a_broken_exif_block_says_nothing_about_the_pixels():
    data = with_orientation(pixels(20, 30), 6)
    place = data.index(b"Exif\0\0") + 6
    data = data[:place] + b"\xff" * 12 + data[place + 12 :]
    assert store(data, AS_IS).storage_kind == "jpeg_untouched"


def test_pillow_does_the_work_where_libturbojpeg_is_missing(monkeypatch):
    monkeypatch.setattr(jpeg, "_turbo", None)
    for mode in ("RGB", "L"):
        data = encoded(pixels(40, 60), mode=mode)
        assert store(data, AS_IS).data == data
        assert store(data, Settings(max_resolution=30)).height == 20
        for length in range(3, len(data) - 2, len(data) // 50):
            with pytest.raises(jpeg.DamagedImage):
                store(data[:length], AS_IS)
    assert store(encoded(pixels(40, 60), mode="CMYK"), AS_IS).storage_kind == "reencoded"
    assert store(with_orientation(pixels(40, 60), 6), AS_IS).height == 60


def test_a_damaged_file_does_not_spoil_the_next():
    """libjpeg-turbo 2.1 goes on reading in the middle of a header that ended too early."""
    good = encoded(pixels(30, 40, 1))
    bad = encoded(pixels(30, 40, 2), progressive=True)
    for length in range(3, len(bad) - 2, 7):
        with pytest.raises(jpeg.DamagedImage):
            store(bad[:length], AS_IS)
        assert store(good, AS_IS).data == good, length


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
def test_other_truncated_files_are_refused(kind):
    data = encoded(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), kind)
    for length in range(1, len(data) - 20, max(1, len(data) // 50)):
        with pytest.raises(jpeg.DamagedImage):
            store(data[:length], AS_IS)


def test_a_flipped_byte_is_refused_or_changes_what_is_stored_alone():
    """Not every flip can be seen; but none may crash, hang, or lead to anything other than these bytes."""
    data = encoded(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8), quality=75)
    random = np.random.default_rng(1)
    refused = 0
    for place in random.integers(3, len(data), 400):
        damaged = bytearray(data)
        damaged[place] ^= int(random.integers(1, 256))
        try:
            stored = store(bytes(damaged), AS_IS)
            assert stored.storage_kind == "reencoded" or stored.data == bytes(damaged)
        except jpeg.DamagedImage as error:
            assert "\n" not in str(error)
            refused += 1
    if jpeg.library() == "libturbojpeg":
        assert refused > 200


@pytest.mark.parametrize(
    "data", [b"", b"a text", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0" + b"\0" * 500, b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_refused(data):
    with pytest.raises(jpeg.DamagedImage):
        store(data, AS_IS)
    with pytest.raises(InputError, match=r"cat\.jpg: not an image"):
        decode_rgb(data, name="cat.jpg")


# ---------------------------------------------------------------- a whole set


def test_a_folder_and_its_manifest(tmp_path):
    files = {
        "ant/a.jpg": encoded(pixels(40, 30, 1)),
        "ant/deeper/b.JPEG": encoded(pixels(20, 30, 2), progressive=True),
        "ant/.hidden": b"never looked at",
        "ant/text.jpg": b"no image",
        "bee/a png.jpg": encoded(pixels(10, 10, 3), "PNG"),
        "bee/cmyk.jpg": encoded(pixels(70, 70, 4), mode="CMYK"),
        "bee/grey.jpg": encoded(pixels(50, 60, 5), mode="L"),
        "bee/zero.jpg": b"",
        "cow/turned.jpg": with_orientation(pixels(30, 20, 6), 6),
        "cow/übel ü.webp": encoded(pixels(80, 80, 7), "WEBP"),
    }
    class_folders(tmp_path / "set", files)
    out = tmp_path / "new" / "folder" / "set.beton"
    returned = convert(str(tmp_path / "set"), out)
    manifest = json.loads((tmp_path / "new/folder/set.beton.json").read_text())
    assert {key: returned[key] for key in manifest if key != "samples"} == {
        key: value for key, value in manifest.items() if key != "samples"
    }
    assert returned["notes"] == ["ignored hidden and system files (1): .hidden"]
    assert (returned["resumed"], returned["estimate"]) == (0, None)
    beton = open_beton(out)

    names = [
        "ant/a.jpg",
        "ant/deeper/b.JPEG",
        "bee/a png.jpg",
        "bee/cmyk.jpg",
        "bee/grey.jpg",
        "cow/turned.jpg",
    ]
    rows = [dict(zip(manifest["sample_columns"], row)) for row in manifest["samples"]]
    assert [row["name"] for row in rows] == [*names, "cow/übel ü.webp"]
    for i, row in enumerate(rows):
        assert row["sha256"] == hashlib.sha256(image_of(beton, i)).hexdigest()
        assert (row["label"], row["bytes"]) == (beton.labels[i], beton.sizes[i])
    assert beton.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert manifest["classes"] == ["ant", "bee", "cow"] and manifest["class_counts"] == [2, 3, 2]
    assert [(r["name"], bool(r["reason"])) for r in manifest["refused"]] == [
        ("ant/text.jpg", True),
        ("bee/zero.jpg", True),
    ]
    assert manifest["stored"] == {"jpeg_untouched": 3, "reencoded": 3, "raw": 1, "turned_upright": 1}
    assert manifest["heights"] == {"min": 10, "median": 40, "max": 80}
    assert (manifest["count"], manifest["source_count"], manifest["split"]) == (7, 9, None)
    assert manifest["bytes"] == out.stat().st_size
    for i in (0, 1, 4):
        assert image_of(beton, i) == files[names[i]], names[i]
    assert (beton.heights[5], beton.widths[5]) == (20, 30)


@pytest.mark.parametrize("settings", [Settings(), Settings(max_resolution=25, subset=20, shuffle_seed=3)])
def test_the_same_bytes_whatever_the_workers(tmp_path, settings):
    photos(tmp_path / "set", classes=3, each=15)
    (tmp_path / "set/class1/003.jpg").write_bytes(b"damaged")
    for i in range(0, 15, 2):
        path = tmp_path / f"set/class2/{i:03}.jpg"
        path.write_bytes(path.read_bytes()[: 30 + 20 * i])
    digests = set()
    for workers in (1, 2, 5):
        convert(
            str(tmp_path / "set"),
            tmp_path / f"{workers}.beton",
            settings,
            options=ConvertOptions(workers=workers),
        )
        digests.add((tmp_path / f"{workers}.beton").read_bytes())
        digests.add((tmp_path / f"{workers}.beton.json").read_bytes())
    assert len(digests) == 2


def test_subset_is_balanced_seeded_and_kept_by_shuffling():
    labels = np.repeat([0, 1, 2, 3], [100, 3, 50, 20])
    chosen = select(labels, 40, None)
    assert np.array_equal(chosen, np.sort(chosen)) and len(set(chosen)) == 40
    counts = np.bincount(labels[chosen])
    assert counts[1] == 3 and counts.sum() == 40 and set(counts[[0, 2, 3]]) <= {12, 13}
    assert np.array_equal(chosen, select(labels, 40, None))
    seven = select(labels, 40, 7)
    assert np.array_equal(seven, select(labels, 40, 7)) and set(seven) != set(select(labels, 40, 8))
    assert not np.array_equal(seven, np.sort(seven))
    assert set(select(labels, 20, 7)) < set(seven)  # a smaller subset is part of a larger one
    assert np.array_equal(select(labels, None, None), np.arange(173))
    assert sorted(select(labels, None, 5)) == list(range(173))
    assert len(select(labels, 173, None)) == 173
    with pytest.raises(InputError, match="--subset 174: there are only 173 images to choose from"):
        select(labels, 174, None)


def test_classes_that_are_left_out_keep_the_others_numbers(tmp_path):
    def stored(name, **options):
        convert("sklearn:digits", tmp_path / name, Settings(**options))
        return open_beton(tmp_path / name), json.loads((tmp_path / f"{name}.json").read_text())

    whole, _ = stored("whole.beton")
    part, manifest = stored("part.beton", only_classes=["7", "2"])
    rows = np.flatnonzero((whole.labels == 2) | (whole.labels == 7))
    assert np.array_equal(part.labels, whole.labels[rows])
    assert all(image_of(part, i) == image_of(whole, row) for i, row in enumerate(rows.tolist()))
    assert manifest["classes"] == [str(number) for number in range(10)]
    few, manifest = stored("few.beton", only_classes=["7", "2"], subset=11, shuffle_seed=1)
    assert sorted(manifest["class_counts"]) == [0] * 8 + [5, 6] and set(few.labels.tolist()) == {2, 7}


@pytest.mark.ffcv
def test_stock_ffcv_reads_every_kind(tmp_path):
    """Progressive, grey, CMYK, PNG, EXIF and raw, all 48 x 48, by FFCV's loader and decoders, both caches."""
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    def image(i):
        return pixels(48, 48, i)

    files = {
        "a/0.jpg": encoded(image(0), quality=95),
        "a/1.jpg": encoded(image(1), quality=95, progressive=True),
        "a/2.jpg": encoded(image(2), mode="L", quality=95),
        "b/3.jpg": encoded(image(3), mode="CMYK", quality=95),
        "b/4.png": encoded(image(4), "PNG"),
        "c/5.jpg": with_orientation(image(5), 8),
        "c/6.jpg": encoded(image(6), mode="L", quality=95, progressive=True),
    }
    expected = [
        np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(d))).convert("RGB")) for d in files.values()
    ]
    class_folders(tmp_path / "set", files)
    convert(str(tmp_path / "set"), tmp_path / "set.beton", Settings(jpeg_quality=95))
    whole = RandomResizedCropRGBImageDecoder((48, 48), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    for decoder, os_cache in ((SimpleRGBImageDecoder(), True), (whole, False)):
        loader = Loader(
            str(tmp_path / "set.beton"),
            batch_size=7,
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            os_cache=os_cache,
            pipelines={"image": [decoder], "label": [IntDecoder()]},
        )
        ((images, labels),) = list(loader)
        assert labels.ravel().tolist() == [0, 0, 0, 1, 1, 2, 2]
        for i, (got, want) in enumerate(zip(np.asarray(images), expected)):
            assert apart(got, want) < 3, (type(decoder).__name__, list(files)[i])
        assert np.array_equal(np.asarray(images)[4], image(4))


def test_the_estimate_of_files_whose_sizes_scatter(tmp_path):
    """Few are converted, more are asked for their size: it must not matter which the few are."""
    random = np.random.default_rng(0)
    sides = random.permutation(np.geomspace(60, 250, 400)).astype(int)
    files = {
        f"c/{i:03}.jpg": encoded(random.integers(0, 256, (s, s, 3), np.uint8)) for i, s in enumerate(sides)
    }
    class_folders(tmp_path / "set", files)
    estimate = convert(str(tmp_path / "set"), tmp_path / "x.beton", options=ConvertOptions(dry_run=True))[
        "estimate"
    ]
    assert estimate["sampled"] == 16
    convert(str(tmp_path / "set"), tmp_path / "x.beton")
    assert estimate["beton_bytes"] == pytest.approx((tmp_path / "x.beton").stat().st_size, rel=0.02)


def line_art(side: int = 120) -> np.ndarray:
    """Thin coloured lines on white, uint8 [side, side, 3]."""
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for i, colour in enumerate(["red", "blue", "green", "black", "magenta"] * 4):
        draw.line((6 * i, 0, side - 1, side - 5 * i), fill=colour)
    return np.asarray(image)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("GIF", {}), ("WEBP", {"lossless": True})])
def test_line_art_is_stored_without_loss(kind, options):
    """Of which a JPEG takes more bytes than its file; photographs and lossy files are stored as JPEGs."""
    data = encoded(line_art(), kind, **options)
    expected = decoded(data)
    stored = store(data, Settings())
    assert stored.storage_kind == "raw" and bytes(stored.data) == expected.tobytes()
    errors = {}
    for sampling in ("4:2:0", "4:4:4"):
        stored = store(data, Settings(line_art="jpeg", jpeg_sampling=sampling))
        assert stored.storage_kind == "reencoded" and len(stored.data) > len(data)
        errors[sampling] = np.abs(decoded(bytes(stored.data)).astype(int) - expected).mean()
    assert errors["4:2:0"] > 2 * errors["4:4:4"] > 1
    noise = np.random.default_rng(0).integers(0, 60, (120, 120, 3), np.uint8)
    photograph = encoded(pixels(120, 120) // 2 + noise, kind, **options)
    assert store(photograph, Settings()).storage_kind == "reencoded"
    assert store(encoded(line_art(), "WEBP", quality=80), Settings()).storage_kind == "reencoded"
