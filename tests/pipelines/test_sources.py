"""The sources beside each other, and what they say of bad input."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from pipelines.errors import InputError
from pipelines.loader import TwoViewLoader, evaluation_batches
from pipelines.parameters import crop_boxes, draw_parameters
from pipelines.sources import open_source
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
@pytest.mark.parametrize("kind", ["beton", "folder"])
def test_dali_gives_the_same_crops(sources, kind, side):
    """Equal within rounding, but for two pixels at the border of a shrunken crop, which DALI repeats."""
    pytest.importorskip("nvidia.dali")
    from pipelines.sources.dali import DALISource

    ours = some_crops(open_source(sources[kind]), side).astype(int)
    theirs = some_crops(DALISource(sources[kind]), side)
    error = np.abs(ours - theirs)
    assert error.mean() < 0.2
    assert np.quantile(error[:, :, 2:-2, 2:-2], 0.999) <= 2 and error.max() <= 30


def test_dali_sees_the_same_epoch_and_names_damage(sources, tmp_path):
    pytest.importorskip("nvidia.dali")
    from pipelines.sources.dali import DALISource

    with TwoViewLoader(open_source(sources["folder"]), VIEW, 8) as loader:
        expected = list(loader)
    with TwoViewLoader(DALISource(sources["folder"]), VIEW, 8, workers=2) as loader:
        found = list(loader)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.parameters, theirs.parameters)
    copy = tmp_path / "pictures"
    shutil.copytree(sources["folder"], copy)
    victim = sorted(copy.glob("class1/*.jpg"))[2]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with TwoViewLoader(DALISource(copy), VIEW, 53, on_error="skip") as loader:
        next(iter(loader))
        assert loader.skipped == 1
    with (
        TwoViewLoader(DALISource(copy), VIEW, 53) as loader,
        pytest.raises(InputError, match="can't be decoded"),
    ):
        next(iter(loader))
    with pytest.raises(InputError, match="cpu or gpu"):
        DALISource(copy, device="tpu")


def test_files_of_every_kind_are_read_upright(tmp_path):
    """A JPEG turned by EXIF, CMYK, 16-bit grey PNG: all as `torchvision` would crop the upright image."""
    random = np.random.default_rng(0)
    pixels = np.asarray(Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((50, 40), 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels).copy()).save(
        tmp_path / "0-turned.jpg", quality=100, subsampling=0, exif=exif
    )
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "1-cmyk.jpg", quality=100, subsampling=0)
    Image.fromarray(pixels).save(tmp_path / "2-plain.png")
    Image.fromarray(pixels).save(tmp_path / "3-progressive.jpg", quality=100, subsampling=0, progressive=True)
    source = open_source(tmp_path)
    assert len(source) == 4 and (source.labels == 0).all()
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
    with TwoViewLoader(open_source(folder), VIEW, 50) as loader, pytest.raises(InputError) as raised:
        list(loader)
    assert "pictures: sample" in str(raised.value) and "can't be decoded" in str(raised.value)
    with TwoViewLoader(open_source(folder), VIEW, 53, on_error="skip", workers=2) as loader:
        (batch,) = list(loader)
        assert set(loader.damaged) == {4, 9, 20} and loader.skipped == 3
        assert any(files[4].name in why for why in loader.damaged.values())
    assert not {4, 9, 20} & set(batch.indices.tolist())
    found = [indices for _, indices in evaluation_batches(open_source(folder), VIEW, on_error="skip")]
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
        open_source(tmp_path / "other.beton")


def test_labels_that_are_no_integers_are_refused(beton, tmp_path):
    content = bytearray(beton.read_bytes())
    content[24 + 1041] = 0  # the second field's type: FFCV's float
    (tmp_path / "other.beton").write_bytes(content)
    with pytest.raises(InputError, match="'label' is not FFCV's integer field"):
        open_source(tmp_path / "other.beton")


def test_another_version_and_a_cut_beton_are_refused(beton, tmp_path):
    content = beton.read_bytes()
    (tmp_path / "old.beton").write_bytes(b"\x01" + content[1:])
    with pytest.raises(InputError, match="version 2"):
        open_source(tmp_path / "old.beton")
    for length in (0, 10, 100, 5000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.beton").write_bytes(content[:length])
        with pytest.raises(InputError, match="cut.beton"):
            open_source(tmp_path / "cut.beton")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no image in it"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        open_source(tmp_path / "none")


def test_a_folder_of_images_trains(sources, tmp_path, lvssl):
    """Never converted: class folders give the labels."""
    out = tmp_path / "run"
    done = lvssl(
        "pretrain", "--data", sources["folder"], "--out", out, "--epochs", 1, "--batch-size", 16,
        "--backbone", "tiny", "--resolution", 16,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "metrics.jsonl").read_text().count("\n") >= 1
