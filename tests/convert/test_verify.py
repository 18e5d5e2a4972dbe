"""What --verify finds and --inspect shows."""

import hashlib
import json

import numpy as np
import pytest
from made_images import class_folders, encoded, photos, pixels
from PIL import Image

from pipelines.convert.command import main
from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.convert.inspect import inspect
from pipelines.convert.merge import merge
from pipelines.convert.verify import verify
from pipelines.datasets.opening import open_dataset
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.formats import manifest as manifests
from pipelines.formats.beton import open_beton


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    files = {f"c{i % 3}/{i}.jpg": encoded(pixels(24, 30, i)) for i in range(8)}
    files |= {"c0/p.png": encoded(pixels(9, 8), "PNG"), "c1/bad.jpg": b"no image"}
    class_folders(root / "set", files)
    rows = [f"set/{name},{name[1]},{i / 7}" for i, name in enumerate(files)]
    (root / "x.csv").write_text("path,label,age\n" + "\n".join(rows) + "\n")
    convert(
        str(root / "x.csv"),
        root / "x.beton",
        Settings(targets=["age"]),
        ConvertOptions(webdataset=root / "tars", images_per_tar=4),
    )
    return root


def test_sound_files(made, capsys):
    for name in ("x.beton", "tars", "tars/images-000001.tar"):
        assert main(["--verify", str(made / name)]) == 0
    assert capsys.readouterr().out.startswith(f"{made / 'x.beton'}: all 9 images are as they were written\n")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *[("x.beton", key) for key in ("targets", "height", "bytes", "sha256", "label", "name")],
        *[("tars", key) for key in ("targets", "height", "bytes", "sha256", "label")],
    ],
)
def test_a_manifest_that_lacks_a_key_is_named(made, name, key):
    """As after the flip of a bit, which --verify is there to find."""
    path = made / name / "manifest.json" if name == "tars" else made / f"{name}.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole.replace(f'"{key}"'.encode(), f'"{key[:-1]}_"'.encode()))
        if key != "name":
            with pytest.raises(InputError, match="manifest.*damaged"):
                verify(made / name)
        if (name, key) in (("tars", "label"), ("x.beton", "name")):
            with pytest.raises(InputError, match=rf"{path.name}: .*damaged \(no {key}\)"):
                open_reader(made / "tars") if name == "tars" else open_dataset(str(made / name))
    finally:
        path.write_bytes(whole)


def test_a_part_whose_manifest_lacks_a_key_is_named(made, tmp_path):
    convert(str(made / "set"), tmp_path / "x.beton", options=ConvertOptions(shard=(1, 1)))
    manifest = tmp_path / "x.part-001-of-001.beton.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"versions"', b'"Versions"', 1))
    with pytest.raises(InputError, match=rf"{manifest.name}: not a conversion's, or damaged \(no versions\)"):
        merge(tmp_path / "x.beton")


@pytest.mark.parametrize("found", [{"classes": None}, {"settings": None}, {"classes": {"a": 1}}])
def test_a_manifest_of_something_else_beside_a_beton_is_ignored(made, tmp_path, found):
    (tmp_path / "x.beton").write_bytes((made / "x.beton").read_bytes())
    (tmp_path / "x.beton.json").write_text(json.dumps(found))
    assert len(open_reader(tmp_path / "x.beton")) == 9


@pytest.mark.parametrize("name", ["x.beton", "tars/images-000000.tar", "tars/images-000002.tar"])
def test_a_flipped_byte_anywhere_is_found(made, name):
    path = made / name
    whole = path.read_bytes()
    step = max(1, len(whole) // 200)
    try:
        for place in [*range(0, len(whole), step), *range(24, 48), *range(len(whole) - 30, len(whole))]:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
            assert not verify(path, workers=1).sound, f"byte {place}"
        for length in (0, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert not verify(path, workers=1).sound, f"{length} bytes"
        path.write_bytes(whole + b"\0")
        assert not verify(path, workers=1).sound
    finally:
        path.write_bytes(whole)
    assert verify(path).sound


def test_an_index_that_was_changed_is_found(made):
    path = made / "tars/images-000001.idx"
    whole = path.read_text()
    path.write_text(whole.replace("cls", "clt", 1))
    verdict = verify(made / "tars")
    path.write_text(whole)
    assert verdict.elsewhere == ["images-000001.idx isn't what was written"]


def test_the_first_wrong_index_and_the_count(made, capsys):
    path = made / "x.beton"
    whole = bytearray(path.read_bytes())
    beton = open_beton(path)
    damaged = bytearray(whole)
    for index in (6, 2):
        damaged[int(beton.offsets[index]) + 100] ^= 1
    path.write_bytes(damaged)
    status = main(["--verify", str(path)])
    path.write_bytes(whole)
    assert status == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"error: {path}: 2 of 9 images wrong, the first: 2 (set/c2/2.jpg): "
        "its bytes aren't those that were written"
    )


def test_an_image_that_was_damaged_before_its_digest_was_taken_is_found(made):
    path, beside = made / "x.beton", made / "x.beton.json"
    whole, text = path.read_bytes(), beside.read_text()
    beton = open_beton(path)
    start, size = int(beton.offsets[3]), int(beton.sizes[3])
    damaged = bytearray(whole)
    damaged[start + size - 2 : start + size] = b"xx"  # no end marker
    image = bytes(damaged[start : start + size])
    manifest = json.loads(text)
    manifest["samples"][3][manifest["sample_columns"].index("sha256")] = hashlib.sha256(image).hexdigest()
    path.write_bytes(damaged)
    beside.write_text(json.dumps(manifest))
    verdict = verify(path)
    path.write_bytes(whole)
    beside.write_text(text)
    assert [wrong[0] for wrong in verdict.wrong] == [3] and "can't be decoded" in verdict.wrong[0][2]


def test_without_a_manifest_it_cannot_be_verified(made, tmp_path):
    (tmp_path / "x.beton").write_bytes((made / "x.beton").read_bytes())
    with pytest.raises(InputError, match=r"x\.beton\.json: the manifest cannot be read"):
        verify(tmp_path / "x.beton")
    (tmp_path / "x.beton.json").write_text("{}")
    with pytest.raises(InputError, match=r"x\.beton\.json: not a manifest of a conversion"):
        verify(tmp_path / "x.beton")
    manifest = json.loads((made / "x.beton.json").read_text())
    for name, value in (("refused", 3), ("refused", ["x"]), ("targets", [3]), ("several_frames", "x")):
        (tmp_path / "x.beton.json").write_text(json.dumps(manifest | {name: value}))
        with pytest.raises(InputError, match=rf"x\.beton\.json: not a manifest .*\(its {name}\)"):
            verify(tmp_path / "x.beton")
    with pytest.raises(InputError, match="no such file"):
        verify(tmp_path / "gone.beton")


def test_rows_of_many_images_are_a_parquet_file(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "ROWS_IN_JSON", 5)
    photos(tmp_path / "set")
    convert(
        str(tmp_path / "set"),
        tmp_path / "out/x.beton",
        options=ConvertOptions(webdataset=tmp_path / "out/tars"),
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "tars",
        "x.beton",
        "x.beton.json",
        "x.beton.samples.parquet",
    ]
    manifest = json.loads((tmp_path / "out/x.beton.json").read_text())
    assert manifest["samples"] == "x.beton.samples.parquet" and manifest["count"] == 12
    assert verify(tmp_path / "out/x.beton").sound and verify(tmp_path / "out/tars").sound
    convert(str(tmp_path / "out/tars"), tmp_path / "again.beton")
    data = bytearray((tmp_path / "out/x.beton").read_bytes())
    data[-500] ^= 4
    (tmp_path / "out/x.beton").write_bytes(data)
    assert not verify(tmp_path / "out/x.beton").sound


@pytest.mark.parametrize("name", ["x.beton", "tars"])
def test_inspect(made, name, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["--inspect", str(made / name), "--sheet", str(sheet)]) == 0
    text = capsys.readouterr().out
    assert "9 images" in text and f"contact sheet: {sheet}" in text and "target age: 0 to" in text
    assert (
        text == inspect(made / name, sheet) + "\n" and "3 classes of 2 to 4 images, 3 at the median" in text
    )
    page = np.asarray(Image.open(sheet))
    assert page.shape == (6 * 142, 8 * 128, 3)
    first = np.asarray(
        page[64 - 12 : 64 + 12, 64 - 15 : 64 + 15], int
    )  # the first image, in its cell's middle
    assert np.abs(first - pixels(24, 30, 0)).mean() < 4


def test_inspect_counts_all_bytes_of_images_that_are_arrays(tmp_path):
    assert "bytes per image (1000 of them)\n" + f"{64:>17,} {1000:10,}" in inspect(
        "sklearn:digits", tmp_path / "x.png"
    )


def test_what_does_not_go_together(made, capsys):
    for typed in (["a", "b", "--verify", "x"], ["--verify", "x", "--merge", "y"], ["--webdataset", "d"]):
        with pytest.raises(SystemExit) as error:
            main(typed)
        assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 3
