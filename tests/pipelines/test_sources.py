"""The sources beside each other, and what they say of bad input."""

import io
import json
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from lvssl.commands.main import main
from lvssl.settings import pretrain as config
from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.datasets import opening, shards
from pipelines.decode import images as folder_source
from pipelines.decode import open_reader
from pipelines.decode.images import ImageReader
from pipelines.errors import InputError
from pipelines.loader import LoaderSettings, Replacements, TwoViewLoader, evaluation_batches
from pipelines.order import ORDERS
from pipelines.parameters import crop_boxes, draw_parameters
from pipelines.views import ViewSettings

VIEW = ViewSettings(resolution=24)


def some_crops(source, side: int) -> np.ndarray:
    indices = np.arange(len(source))
    boxes = crop_boxes(draw_parameters(VIEW, 0, 0, indices, *source.sizes(indices)))
    flips = np.random.default_rng(0).random(boxes.shape[:2]) < 0.5
    out = np.empty((*boxes.shape[:2], side, side, 3), np.uint8)
    source.crops(indices, boxes, out, flips)
    return out


@pytest.mark.parametrize("side", [24, 96])
@pytest.mark.parametrize("kind", ["beton", "folder", "shards"])
def test_dali_gives_the_same_crops(sources, kind, side):
    """Equal within rounding, but for two pixels at the border of a shrunken crop, which DALI repeats."""
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    from pipelines.decode.dali import DALIReader

    ours = some_crops(open_reader(sources[kind]), side).astype(int)
    theirs = some_crops(DALIReader(sources[kind]), side)
    error = np.abs(ours - theirs)
    assert error.mean() < 0.2
    assert np.quantile(error[:, :, 2:-2, 2:-2], 0.999) <= 2 and error.max() <= 30


def test_dali_sees_the_same_epoch_and_names_damage(sources, tmp_path):
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    from pipelines.decode.dali import DALIReader

    with TwoViewLoader(open_reader(sources["folder"]), VIEW, LoaderSettings(8)) as loader:
        expected = list(loader)
    with TwoViewLoader(DALIReader(sources["folder"]), VIEW, LoaderSettings(8, workers=2)) as loader:
        found = list(loader)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.parameters, theirs.parameters)
    copy = tmp_path / "pictures"
    shutil.copytree(sources["folder"], copy)
    victim = sorted(copy.glob("class1/*.jpg"))[2]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    other = sorted(copy.glob("class2/*.png"))[2]  # read by the base source
    other.write_bytes(other.read_bytes()[:99])
    with TwoViewLoader(DALIReader(copy), VIEW, LoaderSettings(53, on_error="skip")) as loader:
        batch = next(iter(loader))
        assert loader.skipped == 2 and len(loader.damaged) == 2
        assert all(victim.name in why or other.name in why for why in loader.damaged.values())
        assert not set(loader.damaged) & set(batch.indices.tolist())
    with (
        TwoViewLoader(DALIReader(copy), VIEW, LoaderSettings(53)) as loader,
        pytest.raises(InputError, match="can't be decoded"),
    ):
        next(iter(loader))
    with pytest.raises(InputError, match="cpu, cuda or cuda:N"):
        DALIReader(copy, device="tpu")


def test_threads_share_a_dali_pipeline(sources):
    """Each gets the crops that it has fed the images of, whoever else feeds meanwhile, into a tensor too; a
    failure is everybody's, and no later call takes another's crops."""
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    from pipelines.decode.dali import DALIReader

    source = DALIReader(sources["folder"])
    indices = np.arange(len(source))
    boxes = crop_boxes(draw_parameters(VIEW, 0, 0, indices, *source.sizes(indices)))
    whole = np.empty((*boxes.shape[:2], 24, 24, 3), np.uint8)
    source.crops(indices, boxes, whole)
    parts = [indices[start::8] for start in range(8)] * 3
    outs = [torch.empty(len(part), 2, 24, 24, 3, dtype=torch.uint8) for part in parts]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda part, out: source.crops(part, boxes[part], out), parts, outs))
    assert all(np.array_equal(whole[part], out) for part, out in zip(parts, outs))
    (pipeline,) = source._pipelines.values()
    with pytest.raises(RuntimeError):
        pipeline.crops([np.zeros(20, np.uint8)], boxes[:1], np.zeros((1, 2), bool))
    with pytest.raises(InputError, match="can't be decoded on cpu .*use --source auto"):
        source.crops(indices, boxes, whole)


def test_tars_are_opened_by_their_indices(sources, tmp_path):
    """The same images as a pass through the tars finds, and the same pixels as from the beton of them."""
    indexed, walked = shards.open_shards(sources["shards"]), opening.open_dataset(str(sources["shards"]))
    assert len(indexed.names) == 53 and list(indexed.names) == list(walked.names)
    assert np.array_equal(indexed.labels, walked.labels) and indexed.classes == walked.classes
    assert all(indexed.read(i) == walked.read(i) for i in range(53))
    copy = tmp_path / "tars"
    shutil.copytree(sources["shards"], copy)
    (copy / "manifest.json").unlink()  # labels from the tars themselves
    assert np.array_equal(shards.open_shards(copy).labels, walked.labels)
    second = shards.open_shards(copy / "images-000001.tar")
    assert list(second.names) == list(walked.names[20:40])
    braces = shards.open_shards(Path(f"{copy}/images-{{000001..000002}}.tar"))
    assert list(braces.names) == list(walked.names[20:])
    crops = [some_crops(open_reader(sources[kind]), 24) for kind in ("shards", "beton")]
    assert np.array_equal(*crops)
    (copy / "images-000001.idx").unlink()
    assert shards.open_shards(copy) is None and len(open_reader(copy)) == 53  # a pass through them it is


def test_each_image_has_its_own_label_whatever_tars_are_named_in_which_order(tmp_path):
    """With the tars' indices or by a pass through them: the rows of a manifest are of the tars that it was
    written with, and are found by the images' numbers."""
    for name, labels in (("a", [0, 0, 1, 1, 2]), ("b", [2, 1, 1, 0, 0])):
        rows = [f"{name}{i}.png,{label},{i + label / 4}\n" for i, label in enumerate(labels)]
        (tmp_path / f"{name}.csv").write_text("path,label,age\n" + "".join(rows))
        for i in range(5):
            Image.new("RGB", (8 + i, 9), (40 * i, 0, len(name))).save(tmp_path / f"{name}{i}.png")
        options = ConvertOptions(webdataset=tmp_path / name, images_per_tar=2)
        convert(str(tmp_path / f"{name}.csv"), None, Settings(targets=["age"]), options=options)
    shutil.copytree(tmp_path / "a", tmp_path / "c", ignore=shutil.ignore_patterns("*0.*"))
    listed = (f"../a/images-{number:06d}.tar\n" for number in (0, 2, 1))
    (tmp_path / "b/list.txt").write_text("".join(listed))
    (tmp_path / "two.txt").write_text("b/images-000001.tar\na/images-000000.tar\n")
    shutil.copytree(tmp_path / "b", tmp_path / "d")
    for path in sorted((tmp_path / "d").glob("images-*")):
        path.rename(path.with_name(path.name.replace("images", "more")))
    for path in (tmp_path / "b").glob("images-*"):
        shutil.copy(path, tmp_path / "d")
    for named, labels in (
        ("a", [0, 0, 1, 1, 2]),
        ("a/images-{000001,000000}.tar", [1, 1, 0, 0]),
        ("a/images-000002.tar", [2]),
        ("b/list.txt", [0, 0, 2, 1, 1]),
        ("two.txt", [1, 0, 0, 0]),
        ("c", [1, 1, 2]),
        ("d/{more,images}-000000.tar", [2, 1, 2, 1]),
    ):
        indexed, walked = open_reader(tmp_path / named), opening.open_dataset(str(tmp_path / named))
        assert list(indexed.names) == list(walked.names)
        assert indexed.labels.tolist() == walked.labels.tolist() == labels, named
        assert indexed.targets["age"].tolist() == walked.targets["age"].tolist(), named
        assert (indexed.labels.dtype, indexed.targets["age"].dtype) == (np.int64, np.float64)


def test_the_manifest_of_other_tars_names_no_class(tmp_path):
    """Two conversions in one set: the numbers are each one's own, and a name would be the first one's."""
    for name, classes in (("a", ("ant", "bee")), ("b", ("cow", "dog"))):
        for kind in classes:
            (tmp_path / name / kind).mkdir(parents=True)
            Image.new("RGB", (8, 9)).save(tmp_path / name / kind / "0.png")
        convert(str(tmp_path / name), None, options=ConvertOptions(webdataset=tmp_path / f"{name}-tars"))
    (tmp_path / "both.txt").write_text("a-tars/images-000000.tar\nb-tars/images-000000.tar\n")
    shutil.copytree(tmp_path / "a-tars", tmp_path / "mixed")
    for end in ("tar", "idx"):
        shutil.copy(tmp_path / f"b-tars/images-000000.{end}", tmp_path / f"mixed/images-000001.{end}")
    for named in ("both.txt", "mixed"):
        for source in (open_reader(tmp_path / named), opening.open_dataset(str(tmp_path / named))):
            assert list(source.classes or "01") == ["0", "1"] and source.labels.tolist() == [0, 1, 0, 1]
    for source in (open_reader(tmp_path / "b-tars"), opening.open_dataset(str(tmp_path / "b-tars"))):
        assert source.classes == ["cow", "dog"]


def test_the_index_of_a_tar_whose_headers_split_long_names(tmp_path):
    """As bsdtar does, and ustar in general: the first part of a long path is in a field of its own."""
    name, data = f"{'x' * 90}/{'y' * 90}.jpg", io.BytesIO()
    Image.new("RGB", (8, 9)).save(data, "JPEG")
    info = tarfile.TarInfo(name)
    info.size = len(data.getvalue())
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(data.getvalue()))
    (tmp_path / "a.idx").write_text(f"v1.2 1\njpg 512 {info.size} {name}\n")
    assert open_reader(tmp_path / "a.tar").names[0] == f"a.tar:{name}"


def test_the_index_of_a_tar_whose_names_have_blanks(tmp_path):
    """Extensions begin at the first dot, as in wds2idx, and therefore have blanks too."""
    data = io.BytesIO()
    Image.new("RGB", (8, 9)).save(data, "JPEG")
    stems, lines = ["at the beach/IMG 0001 (1)", "jpg 1 2", "plain"], []
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, stem in enumerate(stems):
            line = []
            for end, content in (("v1.0 c.JPG", data.getvalue()), ("v1.0 c.cls", b"%d" % number)):
                info = tarfile.TarInfo(f"{stem}.{end}")
                info.size = len(content)
                line.append(f"{end} {archive.offset + 512} {info.size} {info.name}")
                archive.addfile(info, io.BytesIO(content))
            lines.append(" ".join(line))
    (tmp_path / "a.idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
    opened = shards.open_shards(tmp_path / "a.tar")
    assert opened.names == [f"a.tar:{stem}.v1.0 c.JPG" for stem in stems]
    assert opened.labels.tolist() == [0, 1, 2] and opened.read(1) == data.getvalue()


def test_an_index_that_is_not_its_tars_is_refused(sources, tmp_path):
    def damaged(name: str, content: bytes) -> str:
        copy = tmp_path / "tars"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sources["shards"], copy)
        (copy / "manifest.json").unlink()
        (copy / name).unlink()
        (copy / name).write_bytes(content)
        with pytest.raises(InputError) as raised:
            open_reader(copy)
        return str(raised.value)

    tar, index = (sources["shards"] / f"images-000000.{end}" for end in ("tar", "idx"))
    assert "images-000000.tar: cut short" in damaged(tar.name, tar.read_bytes()[:5000])
    assert "isn't the index of" in damaged(index.name, index.with_name("images-000001.idx").read_bytes())
    one_empty = re.sub(rb"\n.+", b"\n", index.read_bytes(), count=1)
    for text in (b"", b"v1.1 20\n", index.read_bytes()[:300], b"\xff\xfe", one_empty):
        assert "images-000000.idx: not an index of DALI's version 1.2" in damaged(index.name, text)
    at = tar.read_bytes().index(b"00000007.cls") + 512
    content = bytearray(tar.read_bytes())
    content[at : at + 1] = b"x"
    assert "00000007.jpg has the class 'x', others have numbers" in damaged(tar.name, bytes(content))


def test_files_of_every_kind_are_read_upright(tmp_path):
    """A JPEG turned by EXIF, CMYK, 16-bit grey PNG: all as `torchvision` would crop the upright image."""
    random = np.random.default_rng(0)
    pixels = np.array(Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((50, 40), 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels).copy()).save(
        tmp_path / "0-turned.jpg", quality=100, subsampling=0, exif=exif
    )
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "1-cmyk.jpg", quality=100, subsampling=0)
    Image.fromarray(pixels).save(tmp_path / "2-plain.png")
    Image.fromarray(pixels).save(tmp_path / "3-progressive.jpg", quality=100, subsampling=0, progressive=True)
    source = open_reader(tmp_path)
    assert len(source) == 4 and (source.labels == -1).all()
    indices = np.arange(4)
    assert [size.tolist() for size in source.sizes(indices)] == [[40] * 4, [50] * 4]
    box = [3, 5, 30, 33]
    out = np.empty((4, 1, 16, 16, 3), np.uint8)
    source.crops(indices, np.tile(np.array(box, np.int32), (4, 1, 1)), out)
    expected = tv.resized_crop(torch.from_numpy(pixels).permute(2, 0, 1), *box, [16, 16], antialias=True)
    for row in indices:
        error = np.abs(out[row, 0].astype(int) - expected.permute(1, 2, 0).numpy())
        assert error.max() <= (1 if row == 2 else 6), source.names[row]


def test_a_file_that_is_no_image_is_named_or_skipped(sources, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(sources["folder"], folder)
    files = sorted(path for path in folder.glob("*/*.*"))
    files[4].write_bytes(b"no image")
    files[9].write_bytes(b"")
    files[20].unlink()
    files[20].symlink_to("gone")
    with (
        TwoViewLoader(open_reader(folder), VIEW, LoaderSettings(50)) as loader,
        pytest.raises(InputError) as raised,
    ):
        list(loader)
    assert "pictures: sample" in str(raised.value) and "can't be decoded" in str(raised.value)
    with TwoViewLoader(open_reader(folder), VIEW, LoaderSettings(53, on_error="skip", workers=2)) as loader:
        (batch,) = list(loader)
        assert set(loader.damaged) == {4, 9, 20} and loader.skipped == 3
        assert any(files[4].name in why for why in loader.damaged.values())
    assert not {4, 9, 20} & set(batch.indices.tolist())
    source = open_reader(folder)
    found = [
        indices for _, indices in evaluation_batches(source, VIEW, replacements=Replacements(source, "skip"))
    ]
    expected = np.arange(53)
    expected[[4, 9, 20]] += 1
    assert np.array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("missing", ["image", "label"])
def test_a_beton_without_a_field_is_refused_by_its_name(beton, tmp_path, missing):
    content = beton.read_bytes()
    (tmp_path / "other.beton").write_bytes(
        content.replace(missing.encode() + b"\0", b"x" * len(missing) + b"\0", 1)
    )
    with pytest.raises(InputError, match=f"no field '{missing}'"):
        open_reader(tmp_path / "other.beton")


def test_labels_that_are_no_integers_are_refused(beton, tmp_path):
    content = bytearray(beton.read_bytes())
    content[24 + 1041] = 0  # the second field's type: FFCV's float
    (tmp_path / "other.beton").write_bytes(content)
    with pytest.raises(InputError, match="'label' is not FFCV's integer field"):
        open_reader(tmp_path / "other.beton")


def test_another_version_and_a_cut_beton_are_refused(beton, tmp_path):
    content = beton.read_bytes()
    (tmp_path / "old.beton").write_bytes(b"\x01" + content[1:])
    with pytest.raises(InputError, match="version 2"):
        open_reader(tmp_path / "old.beton")
    for length in (0, 10, 100, 5000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.beton").write_bytes(content[:length])
        with pytest.raises(InputError, match="cut.beton"):
            open_reader(tmp_path / "cut.beton")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="contains no image"):
        open_reader(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        open_reader(tmp_path / "none")


def test_a_folder_of_images_trains(sources, tmp_path, capfd):
    """Never converted: class folders give the labels. A damaged one is skipped, counted and said."""
    folder, out = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(sources["folder"], folder)
    victim = sorted(folder.glob("class1/*.jpg"))[0]
    victim.write_bytes(victim.read_bytes()[:200])
    options = ["--data", folder, "--out", out, "--epochs", 2, "--batch-size", 16, "--source", "folder"]
    options += ["--order", "quasi-random", "--on-error", "skip", "--backbone", "tiny", "--resolution", 16]
    assert main(["pretrain", *map(str, options), "--log-every", "1", "--threads", "1"]) == 0
    said = capfd.readouterr().err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[-1]["skipped"] >= 1
    assert "of damaged samples (1 distinct)" in said and victim.name in said


def test_settings_of_the_loader_are_refused_by_name(sources):
    assert config.ORDERS == ORDERS
    for name in ("source", "order", "on_error"):
        with pytest.raises(InputError, match=f"unknown {name} 'other'"):
            config.PretrainSettings(**{name: "other"}).validate()
    with pytest.raises(InputError, match="unknown source 'other'"):
        open_reader(sources["beton"], "other")
    with pytest.raises(InputError, match="--source beton"):
        open_reader(sources["beton"], "folder")
    with pytest.raises(InputError, match="is a folder, not a beton"):
        open_reader(sources["folder"], "beton")


@pytest.mark.parametrize("room", [None, 0])
def test_a_folders_images_are_read_once_for_their_sizes_and_crops(sources, room, monkeypatch):
    """Where they fit into the memory for that, and to the same pixels where they don't."""
    if room is not None:
        monkeypatch.setattr(folder_source, "RECENT", room)
    source, read = ImageReader(sources["folder"], labelled=False), []
    stored = source._read
    source._read = lambda index: read.append(index) or stored(index)
    found = torch.cat([crops for crops, _ in evaluation_batches(source, VIEW, workers=2)])
    everything = list(range(len(source)))
    assert sorted(read) == (everything if room is None else sorted(2 * everything))
    known = torch.cat([crops for crops, _ in evaluation_batches(ImageReader(sources["folder"]), VIEW)])
    assert torch.equal(found, known)
