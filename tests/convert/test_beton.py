"""The format: its types are FFCV's, we read what FFCV writes, and damage to the layout is found."""

import gzip

import make_ffcv_beton as made_by_ffcv
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import decoded, image_of, pixels

from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.files import written_aside
from pipelines.formats import beton as format
from pipelines.formats.beton import JPEG, RAW, BetonWriter, open_beton


def write(path, images, capacity=None):
    """images: [(mode, height, width, data, label)]"""
    with written_aside(path) as file:
        writer = BetonWriter(file, capacity or len(images))
        for image in images:
            writer.add(*image)
        writer.finish()
    return path


def raw_images(count, side=5):
    return [(RAW, side, side, pixels(side, side, i).tobytes(), i % 3) for i in range(count)]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What FFCV's own writer has written, with `python tests/convert/make_ffcv_beton.py`."""
    path = tmp_path_factory.mktemp("stock") / "stock.beton"
    path.write_bytes(gzip.decompress(made_by_ffcv.BETON.read_bytes()))
    return path


def test_reads_what_ffcv_has_written(stock):
    beton = open_beton(stock)
    expected = [made_by_ffcv.image(i) for i in range(made_by_ffcv.COUNT)]
    assert beton.heights.tolist() == [image.shape[0] for image in expected]
    assert beton.widths.tolist() == [image.shape[1] for image in expected]
    assert beton.labels.tolist() == [7, 6, 5, 4, 3, 2]
    assert {name: values.tolist() for name, values in beton.targets.items()} == {
        "weight": [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75]
    }
    assert set(beton.modes) == {JPEG, RAW}
    for i, image in enumerate(expected):
        if beton.modes[i] == RAW:
            assert image_of(beton, i) == image.tobytes()
        else:
            assert np.abs(decoded(image_of(beton, i)).astype(int) - image).max() < 20


def test_every_pixel_that_ffcv_has_written_is_cropped(stock):
    """Through the source that trains; its compiled decoder and Pillow agree within rounding."""
    source, beton = open_reader(stock), open_beton(stock)
    for i in range(len(source)):
        height, width = int(beton.heights[i]), int(beton.widths[i])
        out = np.empty((1, 1, 16, 16, 3), np.uint8)
        source.crops(np.array([i]), np.array([[[height - 16, width - 16, 16, 16]]], np.int32), out)
        stored = image_of(beton, i)
        raw = beton.modes[i] == RAW
        image = np.frombuffer(stored, np.uint8).reshape(height, width, 3) if raw else decoded(stored)
        assert np.abs(out[0, 0].astype(int) - image[-16:, -16:]).max() <= (0 if raw else 1)


def test_our_file_is_ffcvs_but_for_where_the_images_lie(stock, tmp_path):
    """The same images written by us: header, fields, metadata and table, byte for byte.

    FFCV starts the images on a page of their own and fills the last one; we do neither.
    """
    theirs = open_beton(stock)
    path = tmp_path / "ours.beton"
    with written_aside(path) as file:
        writer = BetonWriter(file, theirs.count, ["weight"])
        for i in range(theirs.count):
            head = (int(theirs.modes[i]), int(theirs.heights[i]), int(theirs.widths[i]))
            writer.add(*head, image_of(theirs, i), int(theirs.labels[i]), [theirs.targets["weight"][i]])
        writer.finish()

    def layout(path):
        data = path.read_bytes()
        header = np.frombuffer(data, format.HEADER, 1).copy()
        table = np.frombuffer(data, format.ALLOCATION, offset=int(header["alloc_table_ptr"][0])).copy()
        fields = data[24 : 24 + 3 * 1041]
        metadata = np.frombuffer(data, format._metadata_dtype([2, 1, 0]), theirs.count, 24 + 3 * 1041).copy()
        assert table["ptr"].tolist() == metadata["f0"]["data_ptr"].tolist()
        header["alloc_table_ptr"] = table["ptr"] = metadata["f0"]["data_ptr"] = 0
        return header.tobytes(), fields, metadata.tobytes(), table.tobytes()

    assert layout(path) == layout(stock)
    assert [image_of(open_beton(path), i) for i in range(6)] == [image_of(theirs, i) for i in range(6)]


@pytest.mark.ffcv
def test_the_stored_beton_is_what_ffcv_writes(stock, tmp_path):
    """But for the JPEGs' own bytes: those are OpenCV's."""
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    made_by_ffcv.write(tmp_path / "again.beton")
    kept, again = open_beton(stock), open_beton(tmp_path / "again.beton")
    for name in ("modes", "heights", "widths", "labels"):
        assert np.array_equal(getattr(kept, name), getattr(again, name)), name
    assert np.array_equal(kept.targets["weight"], again.targets["weight"])
    front = 24 + 3 * 1041
    assert (tmp_path / "again.beton").read_bytes()[24:front] == stock.read_bytes()[24:front]
    for i in np.flatnonzero(kept.modes == RAW):
        assert image_of(kept, i) == image_of(again, i)


@pytest.mark.ffcv
def test_types_are_those_of_ffcv():
    ffcv_types = pytest.importorskip("ffcv.types", reason="FFCV is not installed")
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField

    assert ffcv_types.CURRENT_VERSION == format.VERSION
    assert ffcv_types.HeaderType == format.HEADER
    assert ffcv_types.FieldDescType == format.FIELD
    assert ffcv_types.ALLOC_TABLE_TYPE == format.ALLOCATION
    fields = [
        FloatField(),
        RGBImageField(),
        IntField(),
        BytesField(),
        NDArrayField(np.dtype("f4"), (3,)),
        JSONField(),
    ]
    ours = format._metadata_dtype([0, 2, 1, 3, 4, 5])
    theirs = ffcv_types.get_metadata_type(fields)
    assert ours.itemsize == theirs.itemsize
    assert [ours.fields[n][1] for n in ours.names] == [theirs.fields[n][1] for n in theirs.names]
    for type_id, (dtype, _) in format.FIELD_TYPES.items():
        handler = ffcv_types.TYPE_ID_HANDLER[type_id]
        if handler in (FloatField, IntField, RGBImageField, BytesField, JSONField):
            assert handler().metadata_type == dtype, handler


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(
        st.sampled_from([1, 100, 700_000, 2**21 - 1, 2**21, 2**21 + 1, 5_000_000]), min_size=1, max_size=6
    )
)
def test_no_image_crosses_a_page(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("pages") / "x.beton"
    images = [(JPEG, 3, 4, bytes([i + 1]) * size, i) for i, size in enumerate(sizes)]
    beton = open_beton(write(path, images))
    page = int(np.fromfile(path, format.HEADER, 1)["page_size"][0])
    assert page >= max(sizes) and page & (page - 1) == 0
    assert np.array_equal(beton.offsets // page, (beton.offsets + beton.sizes - 1) // page)
    for i, size in enumerate(sizes):
        assert image_of(beton, i) == bytes([i + 1]) * size
    assert beton.heights.tolist() == [3] * len(sizes) and beton.widths.tolist() == [4] * len(sizes)
    assert beton.labels.tolist() == list(range(len(sizes)))


def test_room_for_refused_images_is_left_unused(tmp_path):
    beton = open_beton(write(tmp_path / "x.beton", raw_images(4), capacity=9))
    assert beton.count == 4 and image_of(beton, 3) == pixels(5, 5, 3).tobytes()


@pytest.mark.ffcv
def test_reads_what_ffcv_writes(tmp_path):
    """Through FFCV's own fields and allocator, without its worker processes, with fields of other kinds."""
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    from ffcv.fields import BytesField, FloatField, IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    path = tmp_path / "stock.beton"
    fields = {
        "weight": FloatField(),
        "image": RGBImageField("raw"),
        "note": BytesField(),
        "label": IntField(),
    }
    writer = DatasetWriter(str(path), fields, num_workers=1)
    writer.num_samples = 5
    writer.prepare()
    metadata = np.frombuffer(writer.metadata_sm.buf, writer.metadata_type, 5)
    allocator = MemoryAllocator(str(path), writer.data_region_start, writer.page_size)
    with allocator:
        for i in reversed(range(5)):  # its workers finish in any order
            sample = (0.5, pixels(6 + i, 7, i), np.full(3, i, np.uint8), 10 - i)
            handle_sample(sample, i, writer.metadata_type.names, metadata, allocator, fields)
    del metadata
    writer.finalize(allocator.allocations)
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()

    beton = open_beton(path)
    assert beton.labels.tolist() == [10, 9, 8, 7, 6] and beton.heights.tolist() == [6, 7, 8, 9, 10]
    for i in range(5):
        assert image_of(beton, i) == pixels(6 + i, 7, i).tobytes()


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    path = write(tmp_path / "whole.beton", raw_images(20))
    data = path.read_bytes()
    cut = tmp_path / "cut.beton"
    borders = [0, 24, 24 + 1041, 24 + 2 * 1041, 24 + 2 * 1041 + 20 * 24, len(data) - 20 * 24, len(data)]
    places = {b + d for b in borders for d in (-25, -24, -1, 0, 1, 24)} | set(range(0, len(data), 97))
    for place in sorted(p for p in places if 0 <= p < len(data)):
        cut.write_bytes(data[:place])
        with pytest.raises(InputError, match=r"cut\.beton: (truncated|not a beton)"):
            open_beton(cut)
    cut.write_bytes(data + b"\0" * 24)
    with pytest.raises(InputError, match="damaged"):
        open_beton(cut)


def test_a_damaged_layout_is_never_an_exception_of_another_kind(tmp_path):
    """Every byte of header, metadata and table flipped in turn: read as it is, or refused by InputError."""
    path = write(tmp_path / "whole.beton", raw_images(3))
    data = bytearray(path.read_bytes())
    fields_end = 24 + 2 * 1041
    refused = 0
    for place in [*range(24 + 17), *range(fields_end, fields_end + 72), *range(len(data) - 72, len(data))]:
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        (tmp_path / "x.beton").write_bytes(damaged)
        try:
            open_beton(tmp_path / "x.beton")
        except InputError:
            refused += 1
    assert refused > 100  # what is left are labels, padding and sample ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "no such file"),
        ({"make": b""}, "not a beton"),
        ({"make": b"hello, world " * 50}, "not a beton"),
        ({"version": 1}, "not a beton of FFCV's format version 2"),
        ({"alloc_table_ptr": 0}, "never finished"),
        ({"num_samples": 0}, "damaged|holds no image"),
        ({"num_samples": 10**15}, "truncated"),
        ({"num_fields": 60_000}, "truncated"),
        ({"name0": b"picture"}, "has no field 'image'"),
        ({"name1": b"target"}, "has no field 'label'"),
        ({"type1": 0}, "'label' is not FFCV's integer field"),
        ({"type0": 3}, "'image' is not FFCV's RGB image field"),
    ],
)
def test_what_is_no_beton_is_named(tmp_path, change, message):
    path = tmp_path / "x.beton"
    if "make" in change:
        path.write_bytes(change["make"])
    elif change:
        data = bytearray(write(path, raw_images(3)).read_bytes())
        header, fields = (
            np.frombuffer(data, format.HEADER, 1),
            np.frombuffer(data, format.FIELD, 2, offset=24),
        )
        for key, value in change.items():
            if key.startswith("name"):
                fields["name"][int(key[-1])] = np.frombuffer(value.ljust(16, b"\0"), np.uint8)
            elif key.startswith("type"):
                fields["type_id"][int(key[-1])] = value
            else:
                header[key] = value
        path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        open_beton(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_no_beton(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        open_beton(tmp_path)


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    (tmp_path / "x.beton").write_bytes(b"the one from before")
    with pytest.raises(RuntimeError), written_aside(tmp_path / "x.beton") as file:
        file.write(b"half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["x.beton"]
    assert (tmp_path / "x.beton").read_bytes() == b"the one from before"


def test_an_image_too_large_for_any_page_is_refused(tmp_path):
    with open(tmp_path / "x", "w+b") as file:
        writer = BetonWriter(file, 1)
        with pytest.raises(InputError, match="too large for a beton"):
            writer._place(2**31 + 1)
