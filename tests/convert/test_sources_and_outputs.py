"""The same images through every form of input give the same samples; and every form of output is read."""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from made_images import SHARED, class_folders, decoded, encoded, image_of, photos, pixels
from made_sets import every_form, tar_of, train_tar, validation_tar

from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.datasets.columns import Columns
from pipelines.datasets.dataset import Dataset
from pipelines.datasets.imagenet import renumbered
from pipelines.datasets.opening import open_dataset
from pipelines.datasets.tars import Reader, Tar
from pipelines.errors import InputError
from pipelines.formats.beton import open_beton
from pipelines.formats.manifest import read_manifest
from pipelines.formats.openfiles import OpenFiles


def made_files(classes=5, each=4):
    return {
        f"n{c:08d}/n{c:08d}_{i}.JPEG": encoded(pixels(30 + i, 40 + c, seed=10 * c + i), quality=85)
        for c in range(classes)
        for i in range(each)
    }


def contents(path):
    beton, data = open_beton(path), memoryview(path.read_bytes())  # once, not once an image
    places = zip(beton.offsets.tolist(), beton.sizes.tolist(), beton.labels.tolist())
    return [(hashlib.sha256(data[start : start + size]).hexdigest(), label) for start, size, label in places]


def same_through_every_form(tmp_path, files):
    classes = sorted({name.partition("/")[0] for name in files})
    expected = [
        (hashlib.sha256(data).hexdigest(), classes.index(name.partition("/")[0]))
        for name, data in files.items()
    ]
    for form, (source, split) in every_form(tmp_path, files).items():
        out = tmp_path / "out.beton"
        manifest = convert(source, out, options=ConvertOptions(split=split, overwrite=True))
        assert contents(out) == expected, form
        assert manifest["class_counts"] == np.bincount([label for _, label in expected]).tolist(), form
    tars = convert(str(out), None, options=ConvertOptions(webdataset=tmp_path / "tars-of-beton"))
    assert tars["count"] == len(files)
    convert(str(tmp_path / "tars-of-beton"), tmp_path / "back.beton")
    assert contents(tmp_path / "back.beton") == expected


def test_every_form_gives_the_same(tmp_path):
    same_through_every_form(tmp_path, made_files())


@pytest.mark.slow
def test_every_form_gives_the_same_1000_real_images(tmp_path):
    tar = SHARED / "imagenet-sample/imagenet-1k-one-per-class.tar"
    if not tar.is_file():
        pytest.skip(f"no {tar}")
    with tarfile.open(tar) as archive:
        found = {m.name.removeprefix("./"): archive.extractfile(m).read() for m in archive if m.isfile()}
    files = {name: found[name] for name in sorted(found)}
    from pipelines.formats import jpeg

    # One is turned by EXIF and encoded anew, which is the same in every form, but not its own bytes.
    same_through_every_form(
        tmp_path, {n: d for n, d in files.items() if jpeg.read_header(d).orientation == 1}
    )


# ------------------------------------------------------------------------ tables


@pytest.mark.ffcv
def test_regression_targets_reach_ffcv(tmp_path):
    pytest.importorskip("ffcv", reason="FFCV is not installed")
    from ffcv.fields.basics import FloatDecoder, IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    files = {f"{i}.jpg": encoded(pixels(32, 32, i), quality=95) for i in range(6)}
    class_folders(tmp_path, files)
    rows = [f"{i}.jpg,{i * 1.5},{-i / 3:.6f},cam{i}" for i in range(6)]
    (tmp_path / "ages.csv").write_text("path,age,offset,camera\n" + "\n".join(rows) + "\n")
    out = tmp_path / "ages.beton"
    settings = Settings(shuffle_seed=1, targets=["age", "offset"])
    tars = ConvertOptions(webdataset=tmp_path / "tars")
    manifest = convert(str(tmp_path / "ages.csv"), out, settings, tars)
    assert manifest["targets"] == ["age", "offset"]
    assert manifest["notes"] == ["ignored columns; numbers can be stored with --targets (1): camera"]
    beton = open_beton(out)
    order = [int(name.split(".")[0]) for name in read_manifest(tmp_path / "ages.beton.json")[1]["name"]]
    assert beton.targets["age"].tolist() == [i * 1.5 for i in order] and beton.labels.tolist() == [-1] * 6
    fields = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    fields |= {name: [FloatDecoder()] for name in ("age", "offset")}
    loader = Loader(str(out), 6, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=True, pipelines=fields)
    ((images, _, age, offset),) = list(loader)
    assert age.ravel().tolist() == [i * 1.5 for i in order]
    assert np.allclose(offset.ravel(), [-i / 3 for i in order], atol=1e-6)
    assert np.abs(np.asarray(images)[2].astype(int) - decoded(files[f"{order[2]}.jpg"])).mean() < 1
    again = open_dataset(str(tmp_path / "tars"))
    assert again.targets["age"].tolist() == [i * 1.5 for i in order]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "x.csv",
            "name,label\na.jpg,1\n",
            "choose one of its columns with --image-column: name, label",
        ),
        ("x.csv", "path,label\na.jpg,1\nb.jpg,\n", "row 2 has no class, others have one"),
        ("x.csv", "path,label\na.jpg,-1\nb.jpg,0\n", "a.jpg has label -1"),
        ("x.csv", "path,label\na.jpg,0.5\nb.jpg,0.7\nc.jpg,0.1\n", "its labels are fractions"),
        ("x.csv", "path,label\n", "contains no image"),
        ("x.csv", "path,label\na.jpg,0\nb,2.jpg,1\n", "row 2 has more fields than there are columns ('1')"),
        ("x.jsonl", '{"path": "a.jpg"\n', "line 1 is not JSON"),
        ("x.jsonl", '["a.jpg", 1]\n', "line 1 must be an object"),
        ("x.jsonl", '{"path": "a.jpg", "label": 1.5}\n', "its labels are fractions"),
        ("x.jsonl", '{"path": "a.jpg", "label": [1]}\n', "row 1: no class in its column label ([1]"),
        ("x.jsonl", '{"label": 1}\n', "no column of paths"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        open_dataset(str(tmp_path / name))
    assert message in str(error.value) and name in str(error.value)


def test_empty_fields_behind_the_last_column_are_nothing(tmp_path):
    (tmp_path / "x.csv").write_text("path,label\na.jpg,1,\nb.jpg,0, ,\nc.jpg,1\n")
    opened = open_dataset(str(tmp_path / "x.csv"))
    assert opened.names[:] == ["a.jpg", "b.jpg", "c.jpg"] and opened.labels.tolist() == [1, 0, 1]


def test_a_path_that_is_not_there_is_refused_by_name(tmp_path):
    (tmp_path / "1.jpg").write_bytes(encoded(pixels(20, 20)))
    (tmp_path / "x.csv").write_text("path,label\n1.jpg,0\n2.jpg,1\n")
    manifest = convert(str(tmp_path / "x.csv"), tmp_path / "x.beton")
    assert manifest["refused"] == [
        {"name": "2.jpg", "reason": "cannot be read (no such file next to x.csv, where paths are looked up)"}
    ]


# -------------------------------------------------------------------------- tars


def test_a_tar_cut_short_is_named(tmp_path):
    files = made_files(classes=3, each=3)
    for make in (
        lambda: train_tar(tmp_path / "ILSVRC2012_img_train.tar", files),
        lambda: validation_tar(tmp_path / "v", files),
        lambda: tar_of(tmp_path / "plain.tar", files),
        lambda: tar_of(
            tmp_path / "wds.tar", {"1.jpg": b"x" * 3000, "1.cls": b"3", "2.jpg": b"y", "2.cls": b"4"}
        ),
    ):
        path = make()
        whole = path.read_bytes()
        for length in (0, 100, 512, 700, len(whole) // 2, len(whole.rstrip(b"\0")) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match="cut short|this tar contains no files"):
                open_dataset(str(path))
        for place in (10, 130):  # in a header: its checksum says so
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
            with pytest.raises(InputError, match="not a tar, or damaged at byte 0"):
                open_dataset(str(path))


def test_long_names_in_tars(tmp_path):
    files = {f"n0000000{c}/{'x' * 150}{c}.JPEG": encoded(pixels(20, 20, c)) for c in (0, 1)}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        class_folders(tmp_path / "set", files)
        with tarfile.open(path, "w", format=form) as archive:
            archive.add(tmp_path / "set", "")
        source = open_dataset(str(path))
        assert list(source.names) == list(files) and source.read(1) == files[list(files)[1]]


@pytest.mark.parametrize("size", ["x", "-1", "-512", ""])
def test_a_size_that_is_none_is_damage(tmp_path, size):
    """In the header that PAX puts before a file, and in octal in the file's own: else a reader would go on
    for ever, or backwards."""
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a/1.jpg")
        info.size, info.pax_headers = 3, {"size": size}
        archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(InputError, match=r"pax\.tar: damaged at byte 512"):
        open_dataset(str(tmp_path / "pax.tar"))
    if size.startswith("-"):
        header = bytearray(tarfile.TarInfo("a/1.jpg").tobuf(tarfile.USTAR_FORMAT))
        header[124:136] = f"{int(size):011o}\0".encode()
        header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
        (tmp_path / "octal.tar").write_bytes(header + bytes(10240))
        with pytest.raises(InputError, match=r"octal\.tar: not a tar, or damaged at byte 0"):
            open_dataset(str(tmp_path / "octal.tar"))


def test_the_size_that_pax_states_counts(tmp_path):
    """A file's own header has no room for more than 8 GB."""
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (("a/1.jpg", b"abc"), ("b/2.jpg", b"defg")):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"size": str(len(content))}
            archive.addfile(info, io.BytesIO(content))
    data = bytearray((tmp_path / "pax.tar").read_bytes())
    header = data[1024:1536]  # of a/1.jpg, behind PAX's own header and content
    header[124:136] = b"%011o\0" % 0
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    (tmp_path / "pax.tar").write_bytes(data[:1024] + header + data[1536:])
    source = open_dataset(str(tmp_path / "pax.tar"))
    assert [source.read(index) for index in range(2)] == [b"abc", b"defg"]


def test_more_tars_than_sixteen_bits_number(tmp_path):
    """Each shall be its own: 65,536 tars of one image aren't too many."""
    files = OpenFiles()
    tar_of(tmp_path / "x.tar", {"1.jpg": b"abc"})
    tar = Tar(tmp_path / "x.tar", files)
    reader = Reader([tar] * 65_537)
    (member,) = tar.members()
    reader.add(65_536, member)
    assert reader(0) == b"abc" == reader.only([0])(0)


def test_the_validation_tar_needs_its_devkit(tmp_path):
    files = made_files()
    tar = validation_tar(tmp_path / "a", files)
    kit = tmp_path / "a/ILSVRC2012_devkit_t12.tar.gz"
    kit.rename(tmp_path / "kit.tar.gz")
    with pytest.raises(InputError, match="needs the devkit for its labels"):
        open_dataset(str(tar))
    source = open_dataset(str(tar), devkit=tmp_path / "kit.tar.gz")
    assert source.classes == sorted({name.partition("/")[0] for name in files})
    (tmp_path / "kit.tar.gz").write_bytes(b"not a tar at all")
    with pytest.raises(InputError, match="cannot be read as ImageNet's devkit"):
        open_dataset(str(tar), devkit=tmp_path / "kit.tar.gz")


def test_imagenets_tars_may_be_several(tmp_path):
    """A class that lies in two tars of tars is one class; every validation tar is read."""
    files = {f"n0000000{c}/{i}.JPEG": encoded(pixels(8, 8, i)) for c in (0, 1) for i in range(2)}
    train_tar(tmp_path / "train-0.tar", files)
    train_tar(tmp_path / "train-1.tar", {name: data for name, data in files.items() if "0/" in name})
    source = open_dataset(str(tmp_path / "train-{0,1}.tar"))
    assert source.classes == ["n00000000", "n00000001"] and source.labels.tolist() == [0, 0, 0, 0, 1, 1]
    whole = open_dataset(str(validation_tar(tmp_path / "val", files)))
    halves = [0, 2], [1, 3]
    for number, half in enumerate(halves):
        members = {whole.names[i]: whole.read(i) for i in half}
        tar_of(tmp_path / f"val/v-{number}.tar", members)
    source = open_dataset(str(tmp_path / "val/v-*.tar"))
    assert list(source.names) == list(whole.names) and source.labels.tolist() == whole.labels.tolist()
    assert [source.read(i) for i in range(4)] == [whole.read(i) for i in range(4)]


# ------------------------------------------------------------- what looks wrong


def test_imagenets_counts_are_reported(tmp_path):
    photos(tmp_path / "set", classes=2, each=2)
    (tmp_path / "set/class0").rename(tmp_path / "set/n00000000")
    (tmp_path / "set/class1").rename(tmp_path / "set/n00000001")
    assert open_dataset(str(tmp_path / "set")).notes == [
        "looks like ImageNet, but has 2 classes instead of 1,000",
        "looks like ImageNet, but has 4 images instead of 1,281,167 (train) or 50,000 (validation)",
    ]


def test_a_flat_validation_folder_is_reported(tmp_path):
    class_folders(
        tmp_path, {"val/ILSVRC2012_val_00000001.JPEG": encoded(pixels(20, 20)), "train/a/1.jpg": b"x"}
    )
    with pytest.raises(
        InputError, match="validation images without their classes; convert ILSVRC2012_img_val"
    ):
        open_dataset(str(tmp_path), "validation")


def test_validation_classes_are_numbered_as_in_training(tmp_path):
    photos(tmp_path / "train", classes=3, each=2)
    photos(tmp_path / "val", classes=3, each=1)
    import shutil

    shutil.rmtree(tmp_path / "val/class1")
    source = open_dataset(str(tmp_path), "validation")
    assert source.labels.tolist() == [0, 2] and source.classes == ["class0", "class1", "class2"]
    assert "1 of 3 classes" in source.notes[0]
    (tmp_path / "val/class2").rename(tmp_path / "val/class3")
    with pytest.raises(InputError, match="class class3 .* is not among the 3 of .*train"):
        open_dataset(str(tmp_path), "validation")


def test_classes_are_taken_from_a_manifest_or_a_list(tmp_path):
    photos(tmp_path / "set", classes=2, each=1)
    (tmp_path / "names.txt").write_text("class1\nclass0\nclass7\n")
    manifest = convert(
        str(tmp_path / "set"), tmp_path / "a.beton", options=ConvertOptions(classes=tmp_path / "names.txt")
    )
    assert (
        read_manifest(tmp_path / "a.beton.json")[1]["label"] == [1, 0] and manifest["classes"][2] == "class7"
    )
    source = open_dataset(str(tmp_path / "set"), classes=tmp_path / "a.beton.json")
    assert source.labels.tolist() == [1, 0]
    (tmp_path / "names.txt").write_text("class1\n")
    with pytest.raises(InputError, match="class class0 .* is not among the 1"):
        open_dataset(str(tmp_path / "set"), classes=tmp_path / "names.txt")
    with pytest.raises(InputError, match="--classes .*names.txt: the images have no labels"):
        open_dataset(str(tmp_path / "set/class0"), classes=tmp_path / "names.txt")
    without = {"columns": Columns(label="none"), "classes": tmp_path / "names.txt"}
    with pytest.raises(InputError, match="--classes .*names.txt: the images have no labels"):
        open_dataset(str(tmp_path / "set"), **without)


def test_a_list_of_classes_may_begin_with_a_mark_and_two_may_be_called_alike(tmp_path):
    """Editors on Windows put a mark before UTF-8; ImageNet's names have two cranes, each with its number."""
    photos(tmp_path / "set", classes=2, each=1)
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfclass1\nclass0\n")
    assert open_dataset(str(tmp_path / "set"), classes=tmp_path / "names.txt").labels.tolist() == [1, 0]
    cranes = Dataset(["a", "b"], np.array([0, 1]), ["crane", "crane"], lambda _: b"", None)
    assert renumbered(cranes, ["crane", "crane"], "names.txt").labels.tolist() == [0, 1]
    with pytest.raises(InputError, match="names.txt: names two classes crane"):
        renumbered(cranes, ["crane", "heron", "crane"], "names.txt")


# ------------------------------------------------------------------ tars, out


@pytest.fixture
def both(tmp_path):
    """A beton and tars of one pass, of JPEGs, a PNG, a refused file."""
    files = {f"c{i % 3}/{i:03}.jpg": encoded(pixels(32, 40, i), quality=90) for i in range(23)}
    files["c0/zz.png"] = encoded(pixels(30, 20, 99), "PNG")
    files["c1/zz.jpg"] = b"no image"
    class_folders(tmp_path / "set", files)
    convert(
        str(tmp_path / "set"),
        tmp_path / "x.beton",
        options=ConvertOptions(webdataset=tmp_path / "tars", images_per_tar=10),
    )
    return tmp_path


def test_one_pass_is_the_same_as_two(both):
    convert(str(both / "set"), both / "alone.beton")
    convert(
        str(both / "set"), None, options=ConvertOptions(webdataset=both / "tars-alone", images_per_tar=10)
    )
    assert (both / "alone.beton").read_bytes() == (both / "x.beton").read_bytes()
    names = sorted(path.name for path in (both / "tars").iterdir())
    assert names == sorted(path.name for path in (both / "tars-alone").iterdir())
    indexed = [f"images-00000{i}.{end}" for i in range(3) for end in ("idx", "tar")]
    assert names == [*indexed, "manifest.json"]
    for name in names:
        assert (both / "tars" / name).read_bytes() == (both / "tars-alone" / name).read_bytes()


def test_python_and_webdataset_read_the_tars(both):
    beton = open_beton(both / "x.beton")
    seen = 0
    for path in sorted((both / "tars").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                index, extension = int(member.name[:8]), member.name[9:]
                data = archive.extractfile(member).read()
                if extension == "cls":
                    assert int(data) == beton.labels[index]
                elif extension == "jpg":
                    assert data == image_of(beton, index)
                else:
                    assert extension == "png" and decoded(data).tobytes() == image_of(beton, index)
                seen += 1
    assert seen == 2 * beton.count == 48

    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    paths = sorted(map(str, (both / "tars").glob("*.tar")))
    found = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("jpg;png", "cls"))
    assert [label for _, label in found] == beton.labels.tolist()
    assert found[0][0].shape == (32, 40, 3)


def test_the_indices_are_those_of_wds2idx(both, tmp_path):
    script = Path(sys.executable).parent / "wds2idx"
    if not script.is_file():
        pytest.skip("DALI is not installed")
    for path in sorted((both / "tars").glob("*.tar")):
        out = tmp_path / "theirs.idx"
        subprocess.run([sys.executable, script, path, out], check=True, capture_output=True)
        assert out.read_text() == path.with_suffix(".idx").read_text()


def test_dali_reads_the_tars_by_our_indices(both):
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    beton = open_beton(both / "x.beton")
    tars = sorted((both / "tars").glob("*.tar"))

    @dali.pipeline_def(batch_size=beton.count, num_threads=1, device_id=None)
    def pipeline():
        files, labels = dali.fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path.with_suffix(".idx")) for path in tars],
            ext=["jpg;png", "cls"],
        )
        return files, labels

    made = pipeline()
    made.build()
    files, labels = made.run()
    assert [int(bytes(labels.at(i))) for i in range(beton.count)] == beton.labels.tolist()
    for i in range(beton.count):
        data = bytes(files.at(i))
        assert data == image_of(beton, i) if beton.modes[i] == 0 else data[:4] == b"\x89PNG"
