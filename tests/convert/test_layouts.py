"""Trees of images as people have them: splits, what a system leaves behind, links, and names of all kinds.

A tree is {path: content}; it reads alike as a folder, as a tar and as WebDataset's pairs.
"""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import class_folders, encoded, pixels
from made_sets import tar_of
from PIL import Image

from pipelines.convert.command import main
from pipelines.convert.conversion import convert
from pipelines.datasets.columns import Columns
from pipelines.datasets.folders import unlabelled_images
from pipelines.datasets.opening import open_dataset
from pipelines.datasets.recognise import set_name
from pipelines.decode import open_reader
from pipelines.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
IMAGE = encoded(pixels(20, 24, 1))
RUBBISH = (
    *("__MACOSX/a/._0.jpg", "@eaDir/0.jpg/SYNOPHOTO.jpg", ".ipynb_checkpoints/0-checkpoint.jpg"),
    *("lost+found/#12.jpg", ".DS_Store", "Thumbs.db"),
)


def tree(*folders: str, each: int = 2) -> dict[str, bytes]:
    return {f"{folder}/{i}.jpg": f"{folder} {i}".encode() for folder in folders for i in range(each)}


def contents(source) -> list[tuple[str, bytes]]:
    """Class and content of every image, in the source's order."""
    names = [*source.classes, ""]  # "": no label
    return [(names[label], source.read(i)) for i, label in enumerate(source.labels.tolist())]


def webdataset_of(files: dict[str, bytes], classes: list[str]) -> dict[str, bytes]:
    """The same files in the same folders, each with its class beside it."""
    members = {}
    for path, data in files.items():
        label = next(number for number, name in enumerate(classes) if f"{name}/" in f"/{path}")
        members[path] = data
        members[path.rpartition(".")[0] + ".cls"] = str(label).encode()
    return members


def both_ways(tmp_path: Path, files: dict[str, bytes]) -> list[str]:
    class_folders(tmp_path / "set", files)
    tar_of(tmp_path / "set.tar", files)
    return [str(tmp_path / "set"), str(tmp_path / "set.tar")]


SPLITS = {
    "capitals": (("Train/a", "Train/b", "Test/a", "Test/b"), "Train", "Test"),
    "other words": (("training/a", "training/b", "testing/a", "testing/b"), "training", "testing"),
    "upper": (("TRAIN/a", "TRAIN/b", "VALID/a"), "TRAIN", "VALID"),
    "three": (("train/a", "train/b", "test/b", "val/a"), "train", "test"),
    "unlabelled": (("train/a", "train/b", "test/a", "unlabeled/x"), "train", "test"),
    "and more": (("train/a", "train/b", "test/a", "extra/c", "docs"), "train", "test"),
    "one and texts": (("train/a", "train/b"), "train", None),
    "below a folder": (("set/train/a", "set/train/b", "set/test/b"), "set/train", "set/test"),
    "twice": (("train/train/a", "train/train/b", "test/test/b"), "train/train", "test/test"),
    "nested": (("train/a/images", "train/b/images", "val/b/images"), "train", "val"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_found_whatever_their_case_and_neighbours(tmp_path, name):
    folders, train, test = SPLITS[name]
    files = tree(*folders)
    if name == "one and texts":
        files["notes/about.txt"] = b"text"
    for source in both_ways(tmp_path, {**files, **dict.fromkeys(RUBBISH, b"x")}):
        opened = open_dataset(source)
        assert contents(opened) == [
            (path.removeprefix(f"{train}/").split("/")[0], data)
            for path, data in sorted(files.items())
            if path.startswith(f"{train}/")
        ]
        assert opened.split == "train" and opened.classes == ["a", "b"]
        if test is None:
            continue
        opened = open_dataset(source, "test")
        assert opened.split == "test" and opened.classes == ["a", "b"]  # numbered as the training images are
        assert [data for _, data in contents(opened)] == [
            data for path, data in sorted(files.items()) if path.startswith(f"{test}/")
        ]


def test_what_lies_beside_the_splits_is_named(tmp_path):
    files = tree("train/a", "train/b", "test/a", "unlabeled/x", "extra/c") | {"README.txt": b"", "a.jpg": b""}
    for source in both_ways(tmp_path, files):
        assert open_dataset(source).notes == [
            "ignored folders next to the splits (2): extra, unlabeled",
            "reading train; other splits, for convert-beton --split (1): test",
            "ignored files outside of class folders (2): README.txt, a.jpg",
        ]


def test_files_outside_of_class_folders_are_named_in_one_note(tmp_path):
    """It used to be said twice in the same words: of the set's folder, and of the split's."""
    files = tree("train/a", "train/b") | {"README.txt": b"", "train/README.txt": b"", "train/list.csv": b""}
    for source in both_ways(tmp_path, files):
        assert open_dataset(source).notes == [
            "ignored files outside of class folders (3): README.txt, train/README.txt, train/list.csv"
        ]


@pytest.mark.parametrize("loose", [1, 2])
def test_many_images_beside_folders_are_read_without_labels(tmp_path, loose):
    """Of 21 and 22 images one lies outside of the folders, which is less than 5 %; or two, which is more."""
    within = {f"{name}/deep/{i}.jpg": b"%d" % i for name in ("a", "b") for i in range(10)}
    files = within | {f"{i}.JPG": b"loose" for i in range(loose)} | {"README.txt": b""}
    for source in both_ways(tmp_path, files):
        opened = open_dataset(source)
        if loose == 1:
            assert opened.classes == ["a", "b"] and len(opened.names) == 20
            assert opened.notes == ["ignored files outside of class folders (2): 0.JPG, README.txt"]
        else:
            assert not opened.classes and len(opened.names) == 22
            assert opened.notes[0].startswith("no labels: too many images lie next to the folders")
            assert "(2): 0.JPG, 1.JPG" in opened.notes[0]


def test_a_link_in_a_circle_next_to_images_ends(tmp_path):
    files = {"0.jpg": b"0", "1.jpg": b"1", "a/2.jpg": b"2"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "loop").symlink_to(tmp_path / "empty")
    assert [data for _, data in contents(open_dataset(str(tmp_path)))] == list(files.values())


def test_a_class_named_as_a_split_remains_one(tmp_path):
    for source in both_ways(tmp_path, tree("bus", "car", "train")):
        assert open_dataset(source).classes == ["bus", "car", "train"]
        with pytest.raises(InputError, match="has no split 'test', only train"):
            open_dataset(source, "test")


def test_two_folders_of_one_split_are_refused(tmp_path):
    for source in both_ways(tmp_path, tree("Train/a", "train/b", "test/a")):
        with pytest.raises(InputError, match="Train and train are the same split"):
            open_dataset(source)


def test_what_a_system_has_made_is_neither_class_nor_image(tmp_path):
    files = tree("a", "b")
    made = [*RUBBISH, "a/.DS_Store", "a/._0.jpg", "b/Thumbs.db", "b/desktop.ini", "a/@eaDir/0.jpg"]
    for source in both_ways(tmp_path, {**files, **dict.fromkeys(made, b"x")}):
        opened = open_dataset(source)
        assert opened.classes == ["a", "b"] and [data for _, data in contents(opened)] == list(files.values())
        assert any("hidden and system files" in note for note in opened.notes)
    (tmp_path / "wds").mkdir()
    tar_of(tmp_path / "wds/._x.tar", {"x": b""})
    members = {"._0.jpg": b"x", "0.jpg": b"0", "0.cls": b"1", "._1.jpg": b"x", "1.jpg": b"1", "1.cls": b"0"}
    tar_of(tmp_path / "wds/x.tar", members)
    opened = open_dataset(str(tmp_path / "wds"))
    assert contents(opened) == [("1", b"0"), ("0", b"1")]
    assert opened.notes == ["ignored hidden and system files (2): ._0.jpg, ._1.jpg"]


def test_splits_by_the_names_of_tars(tmp_path):
    for name in ("imagenet-train-00", "imagenet-train-01", "imagenet-Validation-00", "words"):
        tar_of(tmp_path / f"set/{name}.tar", {f"{name}.jpg": name.encode(), f"{name}.cls": b"0"})
    opened = open_dataset(str(tmp_path / "set"))
    assert [data for _, data in contents(opened)] == [b"imagenet-train-00", b"imagenet-train-01"]
    assert opened.split == "train" and opened.notes == ["ignored files of no split (1): words.tar"]
    for split in ("validation", "test"):
        opened = open_dataset(str(tmp_path / "set"), split)
        assert [data for _, data in contents(opened)] == [b"imagenet-Validation-00"]
    tar = str(tmp_path / "set/words.tar")
    with pytest.raises(InputError, match="has no splits; leave --split out"):
        open_dataset(tar, "test")


def test_splits_apply_inside_webdataset(tmp_path):
    files = tree("set/train/a", "set/train/b", "set/test/a")
    path = tar_of(tmp_path / "x.tar", webdataset_of(files, ["a", "b"]))
    for split, folder in ((None, "set/train/"), ("train", "set/train/"), ("test", "set/test/")):
        opened = open_dataset(str(path), split)
        expected = [data for name, data in files.items() if name.startswith(folder)]
        assert [data for _, data in contents(opened)] == expected and opened.split == (split or "train")


# ------------------------------------------------------------------- random trees


NAMES = st.sampled_from(
    ["a", "b", "images", "Train", "train", "test", "val", "extra", "x.1", "__MACOSX", ".h"]
)
FILES = st.sampled_from(["0.jpg", "1.JPG", "2.png", "n.o.jpg", "noend", "._0.jpg", "t.txt", "Thumbs.db"])
PATHS = st.builds(lambda folders, file: "/".join([*folders, file]), st.lists(NAMES, max_size=4), FILES)


def read_or_refused(source: str, split: str | None):
    try:
        opened = open_dataset(source, split)
    except InputError:
        return "refused"
    return list(opened.classes), opened.split, list(opened.names), contents(opened)


@settings(max_examples=50, deadline=None)
@given(paths=st.sets(PATHS, min_size=1, max_size=12), split=st.sampled_from([None, "train", "test"]))
def test_a_tree_reads_alike_as_a_folder_and_as_a_tar(tmp_path_factory, paths, split):
    """Classes, split, names, order and contents. (Paths that are both file and folder can't be on disk.)"""
    files = {
        path: path.encode() for path in sorted(paths) if not any(p.startswith(f"{path}/") for p in paths)
    }
    root = tmp_path_factory.mktemp("tree")
    folder, tar = both_ways(root, files)
    expected = read_or_refused(folder, split)
    assert read_or_refused(tar, split) == expected
    with tarfile.open(root / "gnu.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(root / "set", ".")  # folders have entries of their own
    assert read_or_refused(str(root / "gnu.tar"), split) == expected
    if expected == "refused" or not expected[0]:  # nothing to read, or no labels to write beside the images
        return
    classes, found_split, _, images = expected
    chosen = {data.decode(): label for label, data in images if data.endswith((b".jpg", b".JPG", b".png"))}
    if not chosen:
        return
    members = {}  # of all images, whatever their split, each with its class beside it
    for path in files:
        members[path] = files[path]
        if path.endswith((".jpg", ".JPG", ".png")):
            label = classes.index(chosen[path]) if path in chosen else 0
            members[path.rpartition(".")[0] + ".cls"] = str(label).encode()
    paired = open_dataset(str(tar_of(root / "wds.tar", members)), split)
    found = {
        data.decode(): classes[label]
        for label, data in zip(paired.labels, map(paired.read, range(len(paired.names))))
    }
    assert {path: label for path, label in found.items() if path in chosen} == chosen
    if found_split is not None:
        assert paired.split == found_split
        for path in set(found) - set(chosen):  # in no class folder, but its class is beside it
            above = path.rpartition("/")[0]
            assert any(each.startswith(f"{above}/") for each in chosen), path


# ------------------------------------------------------------------------- links


def linked_tar(path: Path, entries: list[tuple[str, bytes | str, bytes]]) -> Path:
    """A tar of (name, content or link, kind)."""
    with tarfile.open(path, "w") as archive:
        for name, content, kind in entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content
                archive.addfile(info)
    return path


def test_links_within_a_tar_are_followed(tmp_path):
    path = linked_tar(
        tmp_path / "x.tar",
        [
            ("./a/0.jpg", b"zero", tarfile.REGTYPE),
            ("./a/1.jpg", "./a/0.jpg", tarfile.LNKTYPE),
            ("./b/2.jpg", "../a/3.jpg", tarfile.SYMTYPE),  # leads forward
            ("./a/3.jpg", b"three", tarfile.REGTYPE),
            ("./b/4.jpg", "2.jpg", tarfile.SYMTYPE),  # a link to a link
            ("./c", "a", tarfile.SYMTYPE),  # a linked folder
            ("./b/gone.jpg", "nothing.jpg", tarfile.SYMTYPE),
            ("./b/out.jpg", "../../../etc/passwd", tarfile.SYMTYPE),
            ("./b/pipe.jpg", "", tarfile.FIFOTYPE),
        ],
    )
    opened = open_dataset(str(path))
    assert (
        list(zip(opened.names, [data for _, data in contents(opened)]))
        == [
            *(("a/0.jpg", b"zero"), ("a/1.jpg", b"zero"), ("a/3.jpg", b"three")),
            *(("b/2.jpg", b"three"), ("b/4.jpg", b"three")),
            *(("c/0.jpg", b"zero"), ("c/1.jpg", b"zero"), ("c/3.jpg", b"three")),
        ]
        or list(opened.names).count("c/1.jpg") == 0
    )
    assert any("(3): x.tar:b/gone.jpg, x.tar:b/out.jpg, x.tar:b/pipe.jpg" in note for note in opened.notes)


def test_hard_links_as_gnu_tar_makes_them(tmp_path):
    class_folders(tmp_path / "set", {"a/0.jpg": b"zero", "b/1.jpg": b"one"})
    for i in range(2, 8):
        os.link(tmp_path / "set/a/0.jpg", tmp_path / f"set/b/{i}.jpg")
    subprocess.run(["tar", "cf", tmp_path / "x.tar", "-C", tmp_path, "set"], check=True)
    folder, tar = open_dataset(str(tmp_path / "set")), open_dataset(str(tmp_path / "x.tar"))
    assert contents(tar) == contents(folder) and len(tar.names) == 8


def test_links_in_webdataset(tmp_path):
    path = linked_tar(
        tmp_path / "x.tar",
        [
            ("0.jpg", b"zero", tarfile.REGTYPE),
            ("0.cls", b"4", tarfile.REGTYPE),
            ("1.jpg", "0.jpg", tarfile.LNKTYPE),
            ("1.cls", "0.cls", tarfile.SYMTYPE),
        ],
    )
    assert contents(open_dataset(str(path))) == [("4", b"zero"), ("4", b"zero")]


# ------------------------------------------------------------------------- names


def test_keys_with_dots(tmp_path):
    members = {}
    for i in range(7):
        members[f"img.{i:04}.jpg"] = str(i).encode()
        members[f"img.{i:04}.cls"] = str(i % 3).encode()
    opened = open_dataset(str(tar_of(tmp_path / "x.tar", members)))
    assert [data for _, data in contents(opened)] == [str(i).encode() for i in range(7)]
    assert opened.labels.tolist() == [i % 3 for i in range(7)] and opened.notes == []


def test_fields_of_samples_have_their_usual_names_in_any_case(tmp_path):
    members = {}
    for i in range(2):
        members |= {f"{i}.jpg": IMAGE, f"{i}.json": f'{{"Label": {1 - i}, "age": {i}}}'.encode()}
    source = open_dataset(str(tar_of(tmp_path / "a.tar", members)))
    assert source.labels.tolist() == [1, 0] and list(source.targets) == ["age"]
    assert open_dataset(str(tmp_path / "a.tar"), columns=Columns(label="age")).labels.tolist() == [0, 1]
    with pytest.raises(InputError, match=r"no sample has a class by the name agee \(--label-column\)"):
        open_dataset(str(tmp_path / "a.tar"), columns=Columns(label="agee"))


def test_samples_of_several_images_name_what_is_left_out(tmp_path):
    members = {"0.input.jpg": b"in", "0.mask.png": b"mask", "0.cls": b"1", "0.txt": b"words"}
    members |= {"1.jpg": b"one", "1.cls": b"0", "1.seg.png": b"mask"}
    opened = open_dataset(str(tar_of(tmp_path / "x.tar", members)))
    assert contents(opened) == [("1", b"in"), ("0", b"one")]
    assert opened.notes == [
        "ignored files that are neither images with a class nor classes (3): 0.mask.png, 0.txt, 1.seg.png"
    ]


KINDS = {
    **{".JPG": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000", "": "JPEG"},
    **{
        ".webp": "WEBP",
        ".TIFF": "TIFF",
        ".jpg.txt": "JPEG",
        ".jpeg_large": "PNG",
        ".gif": "GIF",
        ".bmp": "BMP",
    },
    **{".ppm": "PPM", ".unknown": "WEBP"},
}
Image.init()
KINDS = {end: kind for end, kind in KINDS.items() if kind in Image.SAVE}  # Pillow below 11.3 has no AVIF


@pytest.fixture
def kinds(tmp_path):
    """Images under every name, and two files that are none."""
    files = {f"{i:02}{end}": encoded(pixels(80, 90, i), kind) for i, (end, kind) in enumerate(KINDS.items())}
    files |= {"words.dat": b"no image", "list.json": b"{}"}
    return files


def test_images_are_recognised_by_their_content(tmp_path, kinds):
    class_folders(tmp_path / "set", kinds)
    images = unlabelled_images(tmp_path / "set")
    assert len(images.names) == len(KINDS)
    assert images.notes == ["ignored files that aren't images (2): list.json, words.dat"]
    loose = open_reader(tmp_path / "set")
    assert len(loose) == len(KINDS) and loose.notes == images.notes
    class_folders(tmp_path / "folder", {f"a/{name}": data for name, data in kinds.items()})
    manifest = convert(str(tmp_path / "folder"), tmp_path / "x.beton")
    assert manifest["count"] == len(KINDS)
    assert [each["name"] for each in manifest["refused"]] == ["a/list.json", "a/words.dat"]
    members = {}
    for name, data in kinds.items():
        key, _, end = name.partition(".")
        members |= {f"{key}.{end}" if end else key: data, f"{key}.cls": b"1"}
    paired = open_dataset(str(tar_of(tmp_path / "x.tar", members)))
    assert len(paired.names) == len(KINDS)
    assert paired.notes and "words.dat" in paired.notes[0]


# ------------------------------------------------------------------- many files


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from pipelines.convert.conversion import ConvertOptions, convert
from pipelines.convert.verify import verify
from pipelines.decode.images import ImageReader
import numpy as np
source, out = sys.argv[1:]
print(convert(source, None, options=ConvertOptions(webdataset=out, images_per_tar=1))["count"])
print(len(ImageReader(out)), ImageReader(out)._read(299)[:3].hex(), verify(out))
opened = ImageReader(out)
boxes, crops = np.array([[[0, 0, 8, 8]]], np.int32), np.empty((1, 1, 8, 8, 3), np.uint8)
for index in np.random.default_rng(0).permutation(300):
    opened.crops(np.array([index]), boxes, crops)
"""


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_more_files_than_a_process_may_open(tmp_path, kind):
    if kind == "tars":
        for i in range(300):
            tar_of(tmp_path / f"set/{i:03}.tar", {f"{i:03}.jpg": IMAGE, f"{i:03}.cls": b"1"})
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (tmp_path / "set").mkdir()
        table = pa.table({"image": [IMAGE], "label": [1]})
        for i in range(300):
            pq.write_table(table, tmp_path / f"set/{i:03}.parquet")
    command = [sys.executable, "-c", MANY, str(tmp_path / "set"), str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "300",
        f"300 ffd8ff {tmp_path}/out: all 300 images are as they were written",
    ]


def test_a_tar_that_was_replaced_is_not_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.formats.openfiles.most_open", lambda: 1)
    for i in range(2):
        tar_of(tmp_path / f"set/{i}.tar", {f"{i}.jpg": IMAGE, f"{i}.cls": b"1"})
    opened = open_dataset(str(tmp_path / "set"))
    assert opened.read(0) == IMAGE
    tar_of(tmp_path / "set/1.tar", {"1.jpg": IMAGE + bytes(20_000), "1.cls": b"1"})
    with pytest.raises(InputError, match=r"1\.tar: was changed while it was read"):
        opened.read(1)


def test_the_command_says_what_is_left_out(tmp_path, capsys):
    class_folders(tmp_path / "set", {"train/a/0.jpg": IMAGE, "test/a/0.jpg": IMAGE, "extra/a/0.jpg": IMAGE})
    assert main([str(tmp_path / "set"), str(tmp_path / "x.beton")]) == 0
    said = capsys.readouterr()
    assert "note: ignored folders next to the splits (1): extra" in said.err and ": 1 images" in said.out


@pytest.mark.parametrize("zeros", [0, 512, 3 << 20])
def test_tars_one_behind_the_other_are_read_as_one(tmp_path, zeros):
    parts = []
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "set" / name / "0.png")
        parts.append(tmp_path / f"{name}.tar")
        subprocess.run(["tar", "cf", parts[-1], "-C", tmp_path / "set", name], check=True)
    first, second = (part.read_bytes() for part in parts)
    both = tmp_path / "both.tar"
    both.write_bytes(first + bytes(zeros) + second)
    opened = open_dataset(str(both))
    assert list(opened.names) == ["cat/0.png", "dog/0.png"] and opened.classes == ["cat", "dog"]
    assert opened.read(1) == (tmp_path / "set/dog/0.png").read_bytes()
    both.write_bytes(first + bytes(zeros) + b"no header" * 100)
    said = r"damaged at byte [\d,]+, behind the end of a tar at byte 1,536: pack it again, or leave .*: head"
    with pytest.raises(InputError, match=said) as raised:
        open_dataset(str(both))
    advised = str(raised.value).partition("what follows: ")[2]
    subprocess.run(advised.replace("NEW.tar", "whole.tar"), shell=True, check=True, cwd=tmp_path)
    assert list(open_dataset(str(tmp_path / "whole.tar")).names) == ["cat/0.png"]


@pytest.mark.parametrize("form", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=1.0"])
def test_a_file_stored_without_its_holes_is_named(tmp_path, form):
    (tmp_path / "set/cat").mkdir(parents=True)
    with open(tmp_path / "set/cat/0.bmp", "wb") as file:
        file.write(b"BM")
        file.truncate(1 << 20)
    command = ["tar", "--sparse", *f"--format={form}".split(), "-cf", "x.tar", "-C", "set", "cat"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(InputError, match=r"x.tar: cat/0.bmp is stored without its holes: pack it without"):
        open_dataset(str(tmp_path / "x.tar"))


@pytest.mark.parametrize(
    "source, name",
    [
        ("data/fashion-mnist/train.beton", "fashion-mnist"),
        ("data/fashion-mnist-train.beton", "fashion-mnist"),
        ("cifar10/test-00000-of-00001.parquet", "cifar10"),
        ("/d/imagenet/train-{000000..000010}.tar", "imagenet"),
        ("/d/imagenet/val-000123.tar", "imagenet"),
        ("/d/cars/test-*.beton", "cars"),
        ("coco/val2017", "coco"),
        ("torchvision:CIFAR10", "CIFAR10"),
        ("sklearn:digits", "digits"),
        ("/d/photos-2024", "photos-2024"),
        ("/d/my.photos/", "my.photos"),
        ("train.beton", ""),
    ],
)
def test_a_set_is_named_without_its_split(source, name):
    assert set_name(source) == name
