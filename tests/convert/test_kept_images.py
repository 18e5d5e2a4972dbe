"""JPEGs that libjpeg-turbo warns of or can't read, and images of many pixels: one rule for all commands."""

import io
import json
import struct
import warnings

import numpy as np
import pytest
import torch
from every_command import arguments_of, call
from made_images import class_folders, decoded, encoded, pixels
from PIL import Image

from lvssl.commands.main import main as lvssl
from pipelines.convert.command import main
from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.convert.store import store
from pipelines.datasets.opening import open_dataset
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.formats import jpeg, turbojpeg
from pipelines.loader import LoaderSettings, Replacements, TwoViewLoader, evaluation_batches
from pipelines.views import ViewSettings

VIEW = ViewSettings(resolution=16)
WHOLE = encoded(pixels(40, 48, 1), quality=90)
EXTRANEOUS = WHOLE[:-2] + b"\x12" * 64 + WHOLE[-2:]  # behind the last block, before the end
warned = pytest.mark.skipif(turbojpeg.FOUND is None, reason="Pillow says nothing of extraneous bytes")


@pytest.fixture
def folder(tmp_path):
    """An image with extraneous bytes, a sound one, and one of which nothing can be made."""
    files = {"a/0.jpg": EXTRANEOUS, "a/1.jpg": WHOLE, "b/2.jpg": WHOLE[:300], "b/3.jpg": WHOLE}
    return class_folders(tmp_path / "set", files)


@warned
def test_a_jpeg_with_extraneous_bytes_is_kept_where_asked(folder, tmp_path, capsys):
    out = tmp_path / "x.beton"
    assert main([str(folder), str(out)]) == 0
    assert "skipped a/0.jpg: " in (error := capsys.readouterr().err) and "extraneous bytes" in error
    manifest = convert(str(folder), out, Settings(on_error="keep"), ConvertOptions(overwrite=True))
    assert [each["name"] for each in manifest["refused"]] == ["b/2.jpg"] and manifest["count"] == 3
    stored = open_dataset(str(out)).read(0)
    jpeg.check(stored, jpeg.read_header(stored))  # any reader takes it
    assert np.abs(decoded(stored).astype(int) - decoded(WHOLE)).mean() < 2
    smaller = Settings(on_error="keep", max_resolution=24)
    assert (store(EXTRANEOUS, smaller).height, store(EXTRANEOUS, smaller).width) == (20, 24)


@warned
def test_it_is_kept_in_training_and_evaluation(folder):
    source = open_reader(folder)
    kept_ones = Replacements(source, "keep")
    crops = torch.cat(
        [crops for crops, _ in evaluation_batches(source, VIEW, indices=np.arange(4), replacements=kept_ones)]
    )
    assert torch.equal(crops[0], crops[1]) and list(kept_ones.damaged) == [2]
    out, boxes = np.empty((2, 1, 16, 16, 3), np.uint8), np.array([[[0, 0, 40, 48]]] * 2, np.int32)
    kept_ones.crops(np.array([1, 0]), boxes, out, np.array([[False], [True]]))
    assert np.array_equal(out[1, 0], out[0, 0][:, ::-1]) and out.any()  # mirrored, as a sound one is
    with TwoViewLoader(source, VIEW, LoaderSettings(4, on_error="keep")) as kept:
        batch = next(iter(kept))
        assert set(batch.indices.tolist()) == {0, 1, 3} and kept.skipped == 1
    with TwoViewLoader(source, VIEW, LoaderSettings(4, on_error="skip")) as skipping:
        assert 0 not in next(iter(skipping)).indices.tolist()
    with pytest.raises(InputError, match="on_error must be raise or skip or keep"):
        Replacements(source, "never")


@warned
def test_commands_take_the_option(folder, tmp_path, capsys):
    (folder / "b/2.jpg").unlink()
    run, codes = str(tmp_path / "run"), str(tmp_path / "x.codes")
    options = ["--epochs", "1", "--batch-size", "3", "--backbone", "tiny", "--resolution", "16"]
    assert lvssl(["pretrain", "--data", str(folder), "--out", str(tmp_path / "strict"), *options]) == 2
    assert "a/0.jpg, can't be decoded" in capsys.readouterr().err
    assert lvssl(["pretrain", "--data", str(folder), "--out", run, "--on-error", "keep", *options]) == 0
    assert lvssl(["encode", run, "--images", str(folder), "--out", codes]) == 0  # as in the pretraining
    assert "3 codes of" in capsys.readouterr().out
    for query in (folder, folder / "a/0.jpg"):
        assert lvssl(["search", run, "--codes", codes, "--query", str(query)]) == 0
        capsys.readouterr()


@warned
def test_every_command_reads_what_the_pretraining_kept(tmp_path, capsys):
    """The first image of both sets is damaged, and kept; another can't be read at all."""
    for split, seed in (("train", 0), ("test", 100)):
        places = [(c, i) for c in (0, 1) for i in range(22)]
        files = {f"{'ab'[c]}/{i:02}.jpg": encoded(pixels(24, 24, seed + 50 * c + i)) for c, i in places}
        class_folders(tmp_path / split, files | {"a/00.jpg": EXTRANEOUS, "b/05.jpg": WHOLE[:300]})
    train, test, run = (str(tmp_path / name) for name in ("train", "test", "run"))
    options = ["--data", train, "--epochs", "1", "--batch-size", "11", "--backbone", "tiny"]
    options += ["--resolution", "16", "--on-error", "keep", "--threads", "1", "--family", "none"]
    assert lvssl(["pretrain", *options, "--out", run]) == 0
    sets = ["--test", test]
    for command in (
        ["evaluate", run, *sets],
        ["compression", run, *sets, "--bits", "16"],
        ["analyse", run, *sets, "--samples", "1"],
        ["report", run],
        ["encode", run, "--images", train],
        ["search", run, "--query", test, "--page", str(tmp_path / "many.html")],
        ["search", run, "--query", f"{test}/a/00.jpg", "--page", str(tmp_path / "one.html")],
        ["curate", run, *sets],
        ["evaluate", run, *sets, "--on-error", "skip", "--out", str(tmp_path / "skipping")],
    ):
        status, said = call(command, capsys)
        assert status == 0, said
    for name, count in (("run", 1), ("skipping", 2)):
        result = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert result["data"]["skipped"] == {"train": count, "test": count}


# ------------------------------------------------------------------- odd sampling


def flat_jpeg(sampling: tuple[int, int], levels: tuple[int, int, int], side: int = 48) -> bytes:
    """A JPEG of one colour, Y, Cb, Cr, whose Y has `sampling` (horizontal, vertical) times the samples."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    across, down = sampling
    bits, last = "", [0, 0, 0]
    for _ in range(-(-side // (8 * across)) * -(-side // (8 * down))):
        for component, blocks in enumerate((across * down, 1, 1)):
            for _ in range(blocks):
                step = levels[component] - 128 - last[component]
                last[component] += step
                size = abs(step).bit_length()
                value = step if step >= 0 else step + (1 << size) - 1
                bits += (
                    f"{size:04b}" + (f"{value:0{size}b}" if size else "") + "0"
                )  # "0": no more of the block
    bits += "1" * (-len(bits) % 8)
    scan = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHB", 8, side, side, 3) + bytes([1, across << 4 | down, 0, 2, 0x11, 0, 3, 0x11, 0])
    lengths = bytes([0, 0, 0, 12] + [0] * 12)
    return b"".join(
        [
            *(b"\xff\xd8", segment(0xDB, bytes([0] + [8] * 64)), segment(0xC0, frame)),
            segment(0xC4, b"\0" + lengths + bytes(range(12)) + b"\x10" + bytes([1] + [0] * 15) + b"\0"),
            *(segment(0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0])), scan, b"\xff\xd9"),
        ]
    )


@pytest.mark.parametrize("sampling", [(3, 1), (1, 4), (1, 3), (2, 2)], ids=str)
def test_odd_sampling_is_read_and_stored_in_a_usual_one(tmp_path, sampling):
    data = flat_jpeg(sampling, (150, 100, 180))
    assert (decoded(data) == decoded(data)[0, 0]).all() and decoded(data).std() > 10
    stored = store(data, Settings())
    assert stored.storage_kind == ("jpeg_untouched" if sampling == (2, 2) else "reencoded")
    assert np.abs(decoded(bytes(stored.data)).astype(int) - decoded(data)).max() <= 2
    folder = class_folders(tmp_path / "set", {"a/0.jpg": data})
    crops, _ = next(iter(evaluation_batches(open_reader(folder), VIEW)))
    assert np.abs(crops[0].numpy().astype(int) - decoded(data)[0, 0]).max() <= 2


# -------------------------------------------------------------------- huge images


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_one_limit_of_pixels_for_every_format(tmp_path, monkeypatch, capsys, kind):
    """And Pillow, which has a lower one for some formats, doesn't warn on the terminal."""
    data = encoded(np.zeros((50, 60, 3), np.uint8), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    folder = class_folders(tmp_path / "set", {f"a/0.{kind.lower()}": data})
    out = str(tmp_path / "x.beton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([str(folder), out, "--max-pixels", "2999"]) == 2
        said = "60 x 50 are more than 2,999 pixels; --max-pixels 3000 allows them"
        assert said in capsys.readouterr().err
        assert main([str(folder), out, "--max-pixels", "3000", "--on-error", "raise"]) == 0
        assert next(iter(evaluation_batches(open_reader(folder), VIEW)))[0].shape == (1, 16, 16, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.undo()
    huge = io.BytesIO()
    Image.new("1", (1 << 15, 8193)).save(huge, "PNG")
    folder = class_folders(tmp_path / "huge", {"a/0.png": huge.getvalue()})
    with pytest.raises(InputError, match="32768 x 8193 are more than 268,435,456 pixels"):
        next(iter(evaluation_batches(open_reader(folder), VIEW)))


@pytest.fixture
def any_size():
    """What a command has allowed ends with the test."""
    yield
    jpeg.read_up_to(None)


READING = ("linear", "knn", "finetune", "evaluate", "analyse", "compression", "curate", "encode", "search")


@pytest.mark.usefixtures("any_size")
def test_every_command_that_reads_images_has_the_same_limit(tmp_path, capsys):
    """Here a low one. A run's own holds for what is done with it; a converted image was allowed once."""
    files = {f"{'ab'[i % 2]}/{i:02}.jpg": encoded(pixels(48, 60, i)) for i in range(40)}
    folder = class_folders(tmp_path / "set", files | {"b/99.png": encoded(pixels(60, 60, 99), "PNG")})
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    pretraining = ["pretrain", "--data", folder, "--out", run, "--epochs", 1, "--batch-size", 8]
    pretraining = [*map(str, pretraining), "--preset", "digits", "--family", "sign", "--max-pixels"]
    status, said = call([*pretraining, "0"], capsys)
    assert (status, said) == (2, "error: --max-pixels 0: must be at least 1\n")
    refusal = "b/99.png, can't be decoded (60 x 60 are more than 3,000 pixels; --max-pixels 3600 allows them)"
    status, said = call([*pretraining, "3000"], capsys)
    assert status == 2 and refusal in said
    assert call([*pretraining, "3600", "--resume"], capsys)[0] == 0  # as that message says
    for name in READING:
        arguments = arguments_of(name, run, folder, folder, out)
        arguments += ["--control", str(run)] if name == "compression" else []
        if name == "search":  # by the run's own limit: these may be encoded
            assert call(arguments_of("encode", run, folder, folder, out), capsys)[0] == 0
        status, said = call([*arguments, "--max-pixels", "3000"], capsys)
        assert status == 2 and refusal in said, f"{name}: {said}"
    beton, look = str(tmp_path / "x.beton"), ["--sheet", str(tmp_path / "sheet.png")]
    assert main([str(folder), beton, "--max-pixels", "3600", "--on-error", "raise"]) == 0
    jpeg.read_up_to(3000)
    assert main(["--inspect", beton, *look]) == 0
    knn = [*arguments_of("knn", run, beton, beton, out), "--max-pixels", "3000"]
    assert call(knn, capsys)[0] == 0
