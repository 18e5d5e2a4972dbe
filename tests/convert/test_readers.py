"""Every form of source gives the images and labels that were put into it."""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_images import SHARED, class_folders, decoded, encoded, photos, pixels
from made_sets import tar_of

from lvssl.commands.demo import fashion_mnist
from lvssl.evaluation.encoder import image_set
from pipelines.convert.conversion import ConvertOptions, convert
from pipelines.datasets.columns import Columns
from pipelines.datasets.folders import unlabelled_images
from pipelines.datasets.names import Names
from pipelines.datasets.opening import open_dataset
from pipelines.datasets.parquet import ENTRIES
from pipelines.decode import open_reader
from pipelines.decode.pixels import decode_rgb
from pipelines.errors import InputError
from pipelines.formats.beton import BetonWriter
from pipelines.formats.jpeg import DamagedImage


def parquet(path, images, labels, classes=None, image="image", label="label", **options):
    """An image parquet as the Hugging Face library writes it."""
    rows = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    table = pa.table({image: rows, label: pa.array(labels)})
    if classes:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": classes}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def idx_files(folder, count=12, end=".gz"):
    """MNIST's files, both splits; returns the train images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.stack([pixels(28, 28, i)[..., 0] for i in range(count)])
    for prefix in ("train", "t10k"):
        head = bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes()
        labels = (
            bytes([0, 0, 8, 1]) + np.array([count], ">u4").tobytes() + bytes(i % 10 for i in range(count))
        )
        for name, data in (("images-idx3", head + images.tobytes()), ("labels-idx1", labels)):
            data = gzip.compress(data) if end else data
            (folder / f"{prefix}-{name}-ubyte{end}").write_bytes(data)
        images = 255 - images
    return 255 - images[:count] if prefix == "train" else images


# -------------------------------------------------------------------- folders


def test_class_folders(tmp_path):
    source = open_dataset(str(photos(tmp_path, classes=3, each=2)))
    assert source.classes == ["class0", "class1", "class2"] and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.names[3] == "class1/001.jpg" and source.split is None
    assert source.read(3) == (tmp_path / "class1/001.jpg").read_bytes()


def test_an_empty_class_keeps_its_number_and_is_mentioned(tmp_path):
    photos(tmp_path, classes=2, each=1)
    (tmp_path / "class00").mkdir()
    source = open_dataset(str(tmp_path))
    assert source.classes == ["class0", "class00", "class1"] and source.labels.tolist() == [0, 2]
    assert source.notes == ["class folder class00 is empty"]


@pytest.mark.parametrize(
    ("split", "expected"), [(None, "train"), ("train", "train"), ("validation", "val"), ("test", "val")]
)
def test_folders_of_splits(tmp_path, split, expected):
    photos(tmp_path / "train", classes=2, each=3)
    photos(tmp_path / "val", classes=2, each=1)
    source = open_dataset(str(tmp_path), split)
    assert len(source.names) == {"train": 6, "val": 2}[expected] and source.classes == ["class0", "class1"]
    assert source.split == (split or "train")


def test_names_are_a_list_of_strings_in_little_room():
    given = ["a/1.jpg", "", "übel/ü.png", os.fsdecode(b"not utf-8 \xff.jpg"), "a/1.jpg"]
    names = Names(given)
    assert list(names) == given and len(names) == 5 and names[-2] == given[3] and names[1:3] == given[1:3]
    assert names.index("übel/ü.png") == 2 and not Names() and "b" not in names
    with pytest.raises(IndexError):
        names[5]


def test_linked_folders_are_followed_and_circles_are_not(tmp_path):
    photos(tmp_path / "real", classes=1, each=2)
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "real/class0", tmp_path / "set/linked")
    os.symlink(tmp_path / "set", tmp_path / "real/class0/circle")
    source = open_dataset(str(tmp_path / "set"))
    assert [name for name in source.names if name.count("/") == 1] == ["linked/000.jpg", "linked/001.jpg"]
    assert len(source.names) == 2


def test_folders_of_one_number_are_all_read(tmp_path, monkeypatch):
    """Some file systems number folders alike; only a link can lead in a circle."""
    photos(tmp_path, classes=3, each=2)
    real = os.stat

    def alike(path, *arguments, **options):
        found = list(real(path, *arguments, **options))
        return os.stat_result([found[0], 7, 7, *found[3:]])

    monkeypatch.setattr("pipelines.datasets.folders.os.stat", alike)
    assert len(open_dataset(str(tmp_path)).names) == 6


def test_a_link_to_itself_is_a_damaged_image_alone(tmp_path):
    folder = photos(tmp_path / "set", classes=2, each=1)
    (folder / "class0/loop.jpg").symlink_to("loop.jpg")
    source = open_dataset(str(folder))
    assert list(source.names) == ["class0/000.jpg", "class0/loop.jpg", "class1/000.jpg"]
    manifest = convert(str(folder), tmp_path / "a.beton")
    assert [each["name"] for each in manifest["refused"]] == ["class0/loop.jpg"]


def test_images_are_read_after_the_working_folder_has_changed(tmp_path, monkeypatch):
    photos(tmp_path / "photos", classes=2, each=1)
    data = (tmp_path / "photos/class0/000.jpg").read_bytes()
    (tmp_path / "a.csv").write_text("path\nphotos/class0/000.jpg\n")
    parquet(tmp_path / "a.parquet", [data], [0])
    monkeypatch.chdir(tmp_path)
    opened = [open_dataset(name) for name in ("photos", "photos/class0", "a.csv", "a.parquet")]
    monkeypatch.chdir("/")
    assert [source.read(0) for source in opened] == [data] * 4


def test_a_named_pipe_is_not_waited_for(tmp_path):
    photos(tmp_path, classes=1, each=1)
    os.mkfifo(tmp_path / "class0/pipe.jpg")
    source = open_dataset(str(tmp_path))
    with pytest.raises(DamagedImage, match="not a regular file"):
        source.read(source.names.index("class0/pipe.jpg"))


def test_loose_images_are_listed_and_decoded(tmp_path):
    image = pixels(30, 40)
    files = {
        "b.JPG": encoded(image, quality=95),
        "a/z.png": encoded(image, "PNG"),
        "a/.x.png": b"",
        "a/note.txt": b"",
    }
    class_folders(tmp_path, files)
    images = unlabelled_images(tmp_path)
    paths = [tmp_path / name for name in images.names]
    assert images.notes == [
        "ignored files that aren't images (1): a/note.txt",
        "ignored hidden and system files (1): a/.x.png",
    ]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["a/z.png", "b.JPG"]
    assert np.array_equal(decode_rgb(paths[0]), image)
    assert np.abs(decode_rgb(paths[1]).astype(int) - decoded(files["b.JPG"])).mean() < 1
    assert decode_rgb(str(paths[1])).flags.c_contiguous
    with pytest.raises(InputError, match=r"note\.txt: not an image, or damaged"):
        decode_rgb(tmp_path / "a/note.txt")
    with pytest.raises(InputError, match=r"gone\.jpg: cannot be read \(No such file"):
        decode_rgb(tmp_path / "gone.jpg")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"path;label\n1.png;x\n", "with commas"),
        ("a.tsv", b"path\tlabel\n1.png\tx\n", "with commas"),
        ("a.csv", b"path,label\n1.png,ca\xf1a\n", "save it as UTF-8"),
    ],
)
def test_tables_of_another_form_say_what_to_do(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_reader(tmp_path / name)


def test_classes_with_underscores_are_names_and_no_numbers(tmp_path):
    """Python's int reads 1_12 and 11_2 as 112."""
    (tmp_path / "a.csv").write_text("path,label,room\n1.png,1_12,1_5\n2.png,11_2,1_6\n3.png,1_0,2_0\n")
    source = open_dataset(str(tmp_path / "a.csv"))
    assert source.classes == ["11_2", "1_0", "1_12"] and source.labels.tolist() == [2, 0, 1]
    assert not source.targets


def test_a_first_row_without_class_is_refused_if_others_have_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"path": "1.png"}\n{"path": "2.png", "label": 1}\n')
    with pytest.raises(InputError, match="row 2 has a label, row 1 has none"):
        open_dataset(str(tmp_path / "a.jsonl"))
    assert len(open_dataset(str(tmp_path / "a.jsonl"), columns=Columns(label="none")).names) == 2
    (tmp_path / "b.jsonl").write_text('{"path": "1.png"}\n{"path": "2.png", "note": "x"}\n')
    assert not open_dataset(str(tmp_path / "b.jsonl")).classes


def test_half_a_character_in_a_table_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"path": "1.png", "label": "\\ud83d"}\n')
    with pytest.raises(InputError, match="half a character"):
        open_dataset(str(tmp_path / "a.jsonl"))


def test_a_split_that_a_file_cannot_have_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("path\n1.png\n")
    with pytest.raises(InputError, match=r"a\.csv: has no splits; leave --split out"):
        open_dataset(str(tmp_path / "a.csv"), "test")
    convert("sklearn:digits", tmp_path / "a.beton", options=ConvertOptions(split="test"))
    assert len(open_dataset(str(tmp_path / "a.beton"), "test").names) == 500
    with pytest.raises(InputError, match=r"a\.beton: is of the split 'test'; leave --split out"):
        open_dataset(str(tmp_path / "a.beton"), "train")
    with pytest.raises(InputError, match="splits are train and test"):
        open_dataset("sklearn:digits", "unlabeled")


def test_a_path_that_a_table_lacks_is_looked_up_beside_it(tmp_path):
    (tmp_path / "a.csv").write_text("path\n1.png\n/nowhere/2.png\n")
    opened = open_dataset(str(tmp_path / "a.csv"))
    with pytest.raises(FileNotFoundError, match="no such file next to a.csv"):
        opened.read(0)
    with pytest.raises(FileNotFoundError, match="No such file or directory: '/nowhere"):
        opened.read(1)


# -------------------------------------------------------------------- parquet


def test_parquet(tmp_path):
    images = [encoded(pixels(32, 32, i)) for i in range(25)]
    path = parquet(
        tmp_path / "x.parquet", images, [i % 3 for i in range(25)], ["ant", "bee", "cow"], row_group_size=4
    )
    source = open_dataset(str(path))
    assert source.classes == ["ant", "bee", "cow"] and source.labels.tolist() == [i % 3 for i in range(25)]
    order = np.random.default_rng(0).permutation(25)
    assert [source.read(i) for i in order] == [images[i] for i in order]
    assert (source.names[7], source.split) == ("x.parquet:7", None)


def test_a_folder_of_parquets_is_read_by_split(tmp_path):
    images = [encoded(pixels(16, 16, i)) for i in range(6)]
    parquet(tmp_path / "data/train-00001-of-00002.parquet", images[2:4], [0, 1])
    parquet(tmp_path / "data/train-00000-of-00002.parquet", images[:2], [2, 0])
    parquet(tmp_path / "data/validation-00000-of-00001.parquet", images[4:], [1, 1])
    source = open_dataset(str(tmp_path))
    assert [source.read(i) for i in range(4)] == images[:4] and source.labels.tolist() == [2, 0, 0, 1]
    assert source.classes == ["0", "1", "2"] and source.split == "train"
    for split in ("test", "validation"):
        assert [open_dataset(str(tmp_path), split).read(i) for i in range(2)] == images[4:]
    one = open_dataset(str(tmp_path / "data/validation-00000-of-00001.parquet"))
    assert one.split == "validation" and one.read(0) == images[4]


def test_other_spellings_of_columns(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img": [b"abc", b"def"], "fine_label": [1, 0]}), path)
    source = open_dataset(str(path))
    assert source.read(1) == b"def" and source.labels.tolist() == [1, 0]


def test_a_row_without_bytes_is_damaged(tmp_path):
    path = parquet(tmp_path / "x.parquet", [encoded(pixels(8, 8)), None], [0, 0])
    with pytest.raises(DamagedImage, match="no bytes"):
        open_dataset(str(path)).read(1)


def test_more_folders_of_parquets_than_are_looked_at_are_all_read(tmp_path):
    """Only whether there are tables is told from the first entries of a folder."""
    data = encoded(pixels(8, 8))
    for number in range(ENTRIES + 5):
        parquet(tmp_path / f"train/{number:03}/0.parquet", [data], [number])
    assert len(open_dataset(str(tmp_path)).names) == ENTRIES + 5


def test_a_wrong_label_names_its_own_table(tmp_path):
    parquet(tmp_path / "train-00000-of-00002.parquet", [b"x"] * 2, [0, -1])
    parquet(tmp_path / "train-00001-of-00002.parquet", [b"x"] * 2, [0, 1])
    for source in (tmp_path, tmp_path / "train-*.parquet"):
        with pytest.raises(InputError) as error:
            open_dataset(str(source))
        assert str(error.value).startswith(f"{source}: train-00000-of-00002.parquet:1 has label -1")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"picture": [1.5], "label": [0]}, "choose one of its columns with --image-column: picture, label"),
        ({"image": ["1.jpg"]}, "its column 'image' holds no image files (string); columns that do: none"),
        ({"image": [b"x"], "label": [1.5]}, "its labels are fractions, such as 1.5"),
        ({"image": [b"x", b"y"], "label": [0, None]}, "x.parquet:1 has no class, others have one"),
        ({"image": [b"x", b"y"], "label": [0, -1]}, "x.parquet:1 has label -1; labels are numbers from 0"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "contains no image"),
    ],
)
def test_a_parquet_of_other_columns_is_refused(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(InputError) as error:
        open_dataset(str(tmp_path / "x.parquet"))
    assert message in str(error.value) and "x.parquet" in str(error.value)


def test_a_damaged_parquet_is_named(tmp_path):
    path = parquet(tmp_path / "train-0.parquet", [encoded(pixels(8, 8))] * 9, [0] * 9)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"train-0\.parquet: cannot be read as parquet"):
            open_dataset(str(tmp_path))
    path.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])  # its footer is sound, its pages are not
    with pytest.raises((DamagedImage, InputError)):
        open_dataset(str(path)).read(0)


def test_classes_fewer_than_labels(tmp_path):
    path = parquet(tmp_path / "x.parquet", [b"x"] * 3, [0, 1, 2], ["ant", "bee"])
    with pytest.raises(InputError, match=r"x\.parquet:2 has label 2, but 2 classes are named"):
        open_dataset(str(path))


# ------------------------------------------------- idx, torchvision, sklearn


@pytest.mark.parametrize("end", [".gz", ""])
def test_idx_files(tmp_path, end):
    images = idx_files(tmp_path / "fashion-mnist", end=end)
    for split, expected in ((None, images), ("train", images), ("test", 255 - images)):
        source = open_dataset(str(tmp_path / "fashion-mnist"), split)
        assert np.array_equal(np.stack([source.read(i) for i in range(12)]), expected)
        assert source.labels.tolist() == [i % 10 for i in range(12)] and source.split == (split or "train")
        assert source.classes[9] == "Ankle boot" and len(source.classes) == 10


def test_damaged_idx_files_are_named(tmp_path):
    idx_files(tmp_path)
    assert open_dataset(str(tmp_path)).classes[9] == "9"  # no "fashion" in the path: digits
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for data in (b"", whole[:-100], whole[:2000] + b"x" * 50 + whole[2050:], gzip.compress(b"another file")):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
            open_dataset(str(tmp_path))
    path.write_bytes(whole)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"no file train-labels-idx1-ubyte\.gz"):
        open_dataset(str(tmp_path))
    with pytest.raises(InputError, match="has no split 'validation'"):
        open_dataset(str(tmp_path), "validation")


def test_torchvision_reads_what_lies_in_root(tmp_path):
    images = idx_files(tmp_path / "FashionMNIST/raw", end="")
    for split, expected in ((None, images), ("test", 255 - images)):
        source = open_dataset("torchvision:FashionMNIST", split, tmp_path)
        assert np.array_equal(np.stack([source.read(i)[..., 1] for i in range(12)]), expected)
        assert source.labels.tolist() == [i % 10 for i in range(12)]
        assert source.classes[0] == "T-shirt/top" and "torchvision" in source.libraries


def test_torchvision_sets_whose_targets_are_no_classes_are_refused(tmp_path):
    """Boxes, and images of a film: neither is a number an image."""
    for folder, name in (("image_2", "0.png"), ("label_2", "0.txt")):
        (tmp_path / "Kitti/raw/training" / folder).mkdir(parents=True)
        (tmp_path / "Kitti/raw/training" / folder / name).write_bytes(encoded(pixels(8, 8), "PNG"))
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST/mnist_test_seq.npy", np.zeros((20, 3, 8, 8), np.uint8))
    for name in ("Kitti", "MovingMNIST"):
        with pytest.raises(InputError, match=f"torchvision:{name}: its targets aren't one number per image"):
            open_dataset(f"torchvision:{name}", None, tmp_path)


def test_torchvision_without_network(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(InputError, match="torchvision:CIFAR10: could not be loaded from or downloaded to"):
        open_dataset("torchvision:CIFAR10", None, tmp_path)
    with pytest.raises(InputError, match="torchvision:CIFAR10: splits are train and test"):
        open_dataset("torchvision:CIFAR10", "unlabeled", tmp_path)


@pytest.mark.parametrize(
    "name", ["torchvision:Nothing", "torchvision:ImageFolder", "torchvision:", "sklearn:faces"]
)
def test_unknown_data_sets(name, tmp_path):
    with pytest.raises(InputError, match=name):
        open_dataset(name, None, tmp_path)


def test_digits_are_split_for_ever():
    train, test = open_dataset("sklearn:digits"), open_dataset("sklearn:digits", "test")
    assert (len(train.names), len(test.names)) == (1297, 500)
    assert set(train.names).isdisjoint(test.names)
    assert train.names[:3] == ["digits:1081", "digits:1707", "digits:927"], "the split must not change"
    image = train.read(0)
    assert image.shape == (8, 8) and image.dtype == np.uint8
    levels = np.unique([train.read(i) for i in range(200)])
    assert levels.tolist() == np.rint(np.arange(17) * 255 / 16).astype(int).tolist()


# ----------------------------------------------------------------- real sets


def test_cifar10_parquet():
    folder = SHARED / "cifar10-jpeg"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    source = open_dataset(str(folder), "test")
    assert source.classes[:3] == ["airplane", "automobile", "bird"]
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert decode_rgb(source.read(9_999)).shape == (32, 32, 3)


def test_debians_fashion_mnist():
    folder = fashion_mnist()
    if not os.path.isdir(folder):
        pytest.skip("no Fashion-MNIST here (tools/install.sh fashion-mnist)")
    source = open_dataset(folder)
    assert np.bincount(source.labels).tolist() == [6000] * 10 and source.read(0).shape == (28, 28)
    assert source.classes[source.labels[0]] == "Ankle boot"


# ------------------------------------------------------------- absurd labels


@pytest.mark.parametrize("label", [10**6, 2**40, 2**63, 2**70])
@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl", "cls", "json"])
def test_absurd_labels_are_refused_by_file_and_row(tmp_path, form, label):
    """Before a class is made of each number below it."""
    rows = [0, 1, label]
    path = tmp_path / f"x.{form}"
    if form == "parquet":
        if label >= 2**64:
            pytest.skip("a parquet's integers have 64 bits")
        pq.write_table(pa.table({"image": [b"x"] * 3, "label": pa.array(rows, pa.uint64())}), path)
        named = "x.parquet:2 has label"
    elif form == "csv":
        path.write_text("path,label\n" + "".join(f"{i}.jpg,{each}\n" for i, each in enumerate(rows)))
        named = "2.jpg has label" if label < 2**63 else "row 3 has label"
    elif form == "jsonl":
        path.write_text(
            "".join(json.dumps({"path": f"{i}.jpg", "label": n}) + "\n" for i, n in enumerate(rows))
        )
        named = "2.jpg has label" if label < 2**63 else "row 3 has label"
    else:
        path = tmp_path / "x.tar"
        members = {}
        for i, each in enumerate(rows):
            members[f"{i}.jpg"] = b"x"
            members[f"{i}.{form}"] = (str(each) if form == "cls" else json.dumps({"label": each})).encode()
        tar_of(path, members)
        named = "x.tar:2.jpg has label"
    with pytest.raises(InputError) as error:
        open_dataset(str(path))
    assert named in str(error.value) and "\n" not in str(error.value)
    if label < 2**63:
        assert "more than 25,000 classes are only accepted if" in str(error.value)


def test_labels_of_large_sets_are_believed(tmp_path):
    """A few images of ImageNet-21k, without names; and any number where the names are given."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [b"x"] * 3, "label": [7, 21_840, 7]}), path)
    assert len(open_dataset(str(path)).classes) == 21_841
    names = [f"class {i}" for i in range(40_000)]
    source = open_dataset(str(parquet(path, [b"x"] * 3, [7, 39_999, 7], names)))
    assert source.classes == names and source.labels.tolist() == [7, 39_999, 7]


def test_an_absurd_label_in_a_beton_is_refused(tmp_path):
    from pipelines.decode import open_reader

    path = tmp_path / "x.beton"
    with open(path, "w+b") as file:
        writer = BetonWriter(file, 2)
        for label in (0, 2**40):
            writer.add(1, 2, 2, bytes(12), label)
        writer.finish()
    with pytest.raises(InputError, match=r"x\.beton: image 1 has label 1099511627776, which makes"):
        open_reader(path)


def test_names_of_files_may_be_in_capitals(tmp_path):
    data = encoded(pixels(40, 48))
    class_folders(tmp_path, {"a/0.jpg": data})
    (tmp_path / "SET.CSV").write_text("path,label\na/0.jpg,x\n")
    (tmp_path / "SET.JSONL").write_text('{"path": "a/0.jpg", "label": "x"}\n')
    parquet(tmp_path / "SET.PARQUET", [data], ["x"])
    with pa.OSFile(str(tmp_path / "SET.ARROW"), "wb") as file:
        table = pa.table({"image": [data], "label": ["x"]})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    tar_of(tmp_path / "SET.TAR", {"x/0.jpg": data})
    for kind in ("CSV", "JSONL", "PARQUET", "ARROW", "TAR"):
        path = tmp_path / f"SET.{kind}"
        assert open_dataset(str(path)).read(0) == open_reader(path).encoded(0, 0) == data, kind
        (tmp_path / "LIST.TXT").write_text(f"SET.{kind}\n")
        assert open_reader(tmp_path / "LIST.TXT").encoded(0, 0) == data, kind
        if kind in ("PARQUET", "ARROW", "TAR"):
            (folder := tmp_path / f"only-{kind}").mkdir()
            path.rename(folder / path.name)
            assert open_dataset(str(folder)).read(0) == open_reader(folder).encoded(0, 0) == data, kind
            assert image_set(folder)[0].encoded(0, 0) == data, kind


def test_files_below_a_folder_without_images_are_not_taken_for_images(tmp_path):
    """`encode` takes every image below a folder; class folders, which it takes no notice of, may hold any."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("text")
    with pytest.raises(InputError, match="contains no images"):
        image_set(tmp_path)
