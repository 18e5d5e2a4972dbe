"""Images without labels, which is what self-supervised training is for, and columns of every usual name."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_images import class_folders, encoded, pixels
from made_sets import tar_of

from lvssl.commands.main import main as lvssl
from lvssl.evaluation.encoder import image_set
from pipelines.convert.command import main
from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.convert.inspect import inspect
from pipelines.convert.verify import verify
from pipelines.datasets.columns import Columns
from pipelines.datasets.opening import open_dataset
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.formats.manifest import read_manifest

IMAGES = [encoded(pixels(20, 24, i)) for i in range(6)]


def table(path: Path, columns: dict, names: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table(columns)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, path)
    return path


def loose(folder: Path) -> Path:
    return class_folders(folder, {f"{i}.jpg": data for i, data in enumerate(IMAGES)})


def in_a_table(folder: Path, name: str, text: str) -> Path:
    (loose(folder) / name).write_text(text)
    return folder / name


def metadata(i: int) -> bytes:
    """As img2dataset writes it beside each image."""
    fields = {"caption": f"words {i}", "width": 24, "height": 20, "punsafe": None, "similarity": i / 2}
    return json.dumps(fields).encode()


def img2dataset(path: Path) -> Path:
    members = {}
    for i, data in enumerate(IMAGES):
        members |= {f"{i:05}.jpg": data, f"{i:05}.txt": b"words", f"{i:05}.json": metadata(i)}
    return tar_of(path, members)


UNLABELLED = {
    "loose": loose,
    "tar": lambda folder: tar_of(folder / "x.tar", {f"{i}.jpg": data for i, data in enumerate(IMAGES)}),
    "captions": lambda folder: tar_of(
        folder / "x.tar", {name: data for i, jpg in enumerate(IMAGES) for name, data in
                           ((f"{i}.jpg", jpg), (f"{i}.txt", b"words"))}
    ),
    "img2dataset": lambda folder: img2dataset(folder / "x.tar"),
    "parquet": lambda folder: table(folder / "x.parquet", {"image": IMAGES, "text": ["words"] * 6}),
    "hidden": lambda folder: table(folder / "x.parquet", {"image": IMAGES, "label": [-1] * 6}, ["a", "b"]),
    "csv": lambda folder: in_a_table(folder, "x.csv", "path\n" + "".join(f"{i}.jpg\n" for i in range(6))),
    "jsonl": lambda folder: in_a_table(
        folder, "x.jsonl", "".join(f'{{"file_name": "{i}.jpg", "text": "x"}}\n' for i in range(6))
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNLABELLED)
def test_unlabelled_images_convert_and_are_read_directly(tmp_path, kind):
    source = UNLABELLED[kind](tmp_path / "set")
    reader = open_reader(source)
    assert reader.labels.tolist() == [-1] * 6 and reader.classes == []
    assert [reader.encoded(0, i) for i in range(6)] == IMAGES
    tars = tmp_path / "tars"
    manifest = convert(str(source), tmp_path / "x.beton", options=ConvertOptions(webdataset=tars))
    assert (manifest["count"], manifest["classes"], manifest["class_counts"]) == (6, [], [])
    for made in (tmp_path / "x.beton", tars):
        opened, reader = open_dataset(str(made)), open_reader(made)
        assert opened.labels.tolist() == reader.labels.tolist() == [-1] * 6
        assert opened.classes == reader.classes == [] and [opened.read(i) for i in range(6)] == IMAGES
        assert verify(made).sound
        assert "without labels" in inspect(made, tmp_path / "sheet.png")
    (tars / "manifest.json").unlink()
    assert open_reader(tars).labels.tolist() == [-1] * 6 and open_reader(tars).classes == []


def test_the_split_without_labels(tmp_path):
    """STL-10's third split, as a folder and in a tar; it has no classes, whatever its folders are called."""
    files = {f"set/{split}/{name}/0.jpg": IMAGES[0] for split in ("train", "test") for name in "ab"}
    files |= {f"set/unlabeled/images/{i}.jpg": data for i, data in enumerate(IMAGES[1:])}
    files |= {"set/unlabeled/readme.txt": b"words"}
    class_folders(tmp_path / "x", files)
    for source in (tmp_path / "x", tar_of(tmp_path / "x.tar", files)):
        opened = open_dataset(str(source), "unlabeled")
        assert [opened.read(i) for i in range(5)] == IMAGES[1:] and len(opened.names) == 5
        assert (opened.labels.tolist(), opened.classes, opened.split) == ([-1] * 5, [], "unlabeled")
        assert "ignored files that aren't images (1): readme.txt" in opened.notes
        assert open_dataset(str(source)).classes == ["a", "b"]
    out = str(tmp_path / "x.beton")
    assert main([str(tmp_path / "x"), out, "--split", "unlabeled", "--on-error", "raise"]) == 0
    assert open_reader(out).labels.tolist() == [-1] * 5
    table(tmp_path / "hub/train-0.parquet", {"image": IMAGES[:1], "label": [0]})
    table(tmp_path / "hub/unlabeled-0.parquet", {"image": IMAGES[1:], "label": [-1] * 5})
    assert open_dataset(str(tmp_path / "hub"), "unlabeled").classes == []


def test_pretraining_without_labels_and_what_needs_them(tmp_path, capsys):
    """Loose images pretrain and encode; whatever needs labels says so in one line, before any work."""
    photos, run = loose(tmp_path / "photos"), str(tmp_path / "run")
    options = [
        "--family",
        "none",
        "--epochs",
        "1",
        "--batch-size",
        "6",
        "--backbone",
        "tiny",
        "--resolution",
        "16",
    ]
    assert lvssl(["pretrain", "--data", str(photos), "--out", run, "--device", "cpu", *options]) == 0
    assert lvssl(["encode", run, "--images", str(photos), "--out", str(tmp_path / "x.codes")]) == 0
    labelled = class_folders(tmp_path / "labelled", {f"{c}/0.jpg": IMAGES[i] for i, c in enumerate("ab")})
    capsys.readouterr()
    for command in ("evaluate", "linear", "knn", "finetune", "analyse", "compression"):
        assert lvssl([command, run, "--test", str(labelled)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{photos}: its images have no labels" in error and error.startswith("error: "), command
    for command in ("evaluate", "linear", "knn"):
        assert lvssl([command, run, "--train", str(labelled), "--test", str(photos)]) == 2
        assert f"{photos}: its images have no labels" in capsys.readouterr().err


def test_some_labels_of_many_are_refused_by_row(tmp_path):
    path = in_a_table(tmp_path, "x.csv", "path,label\n0.jpg,1\n1.jpg,\n")
    with pytest.raises(InputError, match=r"x\.csv: row 2 has no class, others have one"):
        open_dataset(str(path))
    opened = open_dataset(str(path), columns=Columns(label="none"))
    assert opened.labels.tolist() == [-1, -1]
    tar = tar_of(
        tmp_path / "x.tar", {"0.jpg": b"x", "0.cls": b"1", "1.jpg": b"y", "2.jpg": b"z", "2.cls": b"0"}
    )
    with pytest.raises(InputError, match=r"x\.tar:1\.jpg has no class"):
        open_dataset(str(tar))


# ----------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "image", ["img", "jpg", "webp", "pixel_values", "image_bytes", "Image", "only_bytes"]
)
@pytest.mark.parametrize("label", ["labels", "target", "class", "cls", "fine_label", "Label"])
def test_usual_columns_of_parquet(tmp_path, image, label):
    opened = open_dataset(
        str(table(tmp_path / "x.parquet", {"id": [7, 8], image: IMAGES[:2], label: [1, 0]}))
    )
    assert opened.labels.tolist() == [1, 0] and opened.read(1) == IMAGES[1]


@pytest.mark.parametrize("path", ["file_name", "image_path", "filepath", "Path", " path"])
def test_usual_columns_of_tables(tmp_path, path):
    text = f",{path}, Label\n0,0.jpg, cat\n1,1.jpg, ant\n"  # pandas writes its index without a name
    opened = open_dataset(str(in_a_table(tmp_path, "x.csv", text)))
    assert opened.classes == ["ant", "cat"] and opened.labels.tolist() == [1, 0]
    assert opened.targets == {} and opened.notes == [] and opened.read(1) == IMAGES[1]


@pytest.mark.parametrize(
    ("labels", "numbers", "classes"),
    [
        (["cat", "ant", "cat"], [1, 0, 1], ["ant", "cat"]),
        (pa.array(["cat", "ant", "cat"]).dictionary_encode(), [1, 0, 1], ["ant", "cat"]),
        ([True, False, True], [1, 0, 1], ["False", "True"]),
        ([2.0, 0.0, 1.0], [2, 0, 1], ["0", "1", "2"]),
        (pa.array([2, 0, 1], pa.uint8()), [2, 0, 1], ["0", "1", "2"]),
    ],
)
def test_labels_of_other_types(tmp_path, labels, numbers, classes):
    opened = open_dataset(str(table(tmp_path / "x.parquet", {"image": IMAGES[:3], "label": labels})))
    assert opened.labels.tolist() == numbers and opened.classes == classes
    rows = pa.array(labels).to_pylist() if isinstance(labels, list) else labels.to_pylist()
    lines = [json.dumps({"image": f"{i}.jpg", "label": each}) for i, each in enumerate(rows)]
    opened = open_dataset(str(in_a_table(tmp_path, "x.jsonl", "\n".join(lines))))
    assert opened.labels.tolist() == numbers and opened.classes == classes
    members = {f"{i}.jpg": IMAGES[i] for i in range(3)}
    members |= {f"{i}.json": json.dumps({"label": each}).encode() for i, each in enumerate(rows)}
    opened = open_dataset(str(tar_of(tmp_path / "x.tar", dict(sorted(members.items())))))
    assert opened.labels.tolist() == numbers and opened.classes == classes


def test_columns_by_other_names(tmp_path, capsys):
    path = table(tmp_path / "x.parquet", {"left": IMAGES[:2], "right": IMAGES[2:4], "kind": ["b", "a"]})
    assert main([str(path), str(tmp_path / "x.beton")]) == 2
    error = capsys.readouterr().err
    assert "choose one of its columns with --image-column: left, right, kind" in error
    options = ["--image-column", "right", "--label-column", "kind"]
    assert main([str(path), str(tmp_path / "x.beton"), *options]) == 0
    made = open_dataset(str(tmp_path / "x.beton"))
    assert made.classes == ["a", "b"] and [made.read(i) for i in range(2)] == IMAGES[2:4]
    assert read_manifest(tmp_path / "x.beton.json")[0]["settings"]["image_column"] == "right"
    capsys.readouterr()
    for option, wrong in (("--image-column", "kind"), ("--image-column", "top"), ("--label-column", "top")):
        given = {"--image-column": "left", option: wrong}
        assert (
            main([str(path), str(tmp_path / "y.beton"), *(part for pair in given.items() for part in pair)])
            == 2
        )
        error = capsys.readouterr().err
        assert wrong in error and "right" in error and error.count("\n") == 1
    table(tmp_path / "lists.parquet", {"image": IMAGES[:2], "label": [[0], [0, 1]]})
    opened = open_dataset(str(tmp_path / "lists.parquet"))
    assert opened.classes == [] and opened.notes == ["ignored column 'label': it holds no single class"]
    with pytest.raises(InputError, match=r"lists\.parquet:0: its column 'label' must hold a class"):
        open_dataset(str(tmp_path / "lists.parquet"), columns=Columns(label="label"))


def test_keys_in_tars(tmp_path):
    members = {}
    for i in range(2):
        members[f"{i}.left.jpg"], members[f"{i}.right.jpg"] = IMAGES[i], IMAGES[2 + i]
        members[f"{i}.kind.txt"], members[f"{i}.json"] = b"ab"[i : i + 1], b'{"other": %d}' % (1 - i)
    path = str(tar_of(tmp_path / "x.tar", members))
    first = open_dataset(path)
    assert [first.read(i) for i in range(2)] == IMAGES[:2] and first.classes == []
    for key in ("right", "right.jpg"):
        second = open_dataset(path, columns=Columns(image=key, label="kind.txt"))
        assert [second.read(i) for i in range(2)] == IMAGES[2:4]
        assert second.classes == ["a", "b"] and second.labels.tolist() == [0, 1]
    assert open_dataset(path, columns=Columns(label="other")).labels.tolist() == [1, 0]
    with pytest.raises(InputError, match=r"x\.tar: no image by the name top \(--image-key\)"):
        open_dataset(path, columns=Columns(image="top"))


# ----------------------------------------------------------------------- targets


def test_metadata_is_a_target_only_where_it_is_asked_for(tmp_path, capsys):
    tar, out = img2dataset(tmp_path / "x.tar"), tmp_path / "x.beton"
    table(
        tmp_path / "x.parquet", {"image": IMAGES, "width": [24] * 6, "similarity": [i / 2 for i in range(6)]}
    )
    rows = "".join(f"{i}.jpg,24,{i / 2}\n" for i in range(6))
    in_a_table(tmp_path, "x.csv", "path,width,similarity\n" + rows)
    for source in (tar, tmp_path / "x.parquet", tmp_path / "x.csv"):
        manifest = convert(str(source), out, options=ConvertOptions(overwrite=True))
        assert manifest["targets"] == [] and any("width" in note for note in manifest["notes"]), source
        manifest = convert(str(source), out, Settings(targets=["similarity"]), ConvertOptions(overwrite=True))
        assert manifest["targets"] == ["similarity"]
        assert open_reader(out).targets["similarity"].tolist() == [i / 2 for i in range(6)]
    for name, said in (
        ("punsafe", "no number 'punsafe'"),
        ("age", "no number 'age'"),
        ("image", "can't have"),
    ):
        assert main([str(tar), str(tmp_path / "y.beton"), "--targets", name]) == 2
        assert said in capsys.readouterr().err


def test_targets_have_names_of_any_length(tmp_path):
    name = "aesthetic score, mean of the raters"
    source = table(
        tmp_path / "x.parquet", {"image": IMAGES, name: [i / 3 for i in range(6)], "größe": [1.5] * 6}
    )
    settings = Settings(targets=["größe", name])
    convert(str(source), tmp_path / "x.beton", settings, ConvertOptions(webdataset=tmp_path / "tars"))
    parts = tmp_path / "parts.beton"
    for number in (1, 2):
        convert(str(source), parts, settings, ConvertOptions(shard=(number, 2)))
    assert main(["--merge", str(parts)]) == 0 and main(["--verify", str(parts)]) == 0
    convert(str(tmp_path / "tars"), tmp_path / "again.beton")
    for made in (tmp_path / "x.beton", parts, tmp_path / "again.beton"):
        for opened in (open_dataset(str(made)), open_reader(made)):
            assert {*opened.targets} == {"größe", name} and (opened.targets["größe"] == 1.5).all()
            assert np.allclose(opened.targets[name], [i / 3 for i in range(6)])


# ----------------------------------------------------------------- the Hub's layouts


@pytest.mark.parametrize(
    "file",
    [
        *("data/{}-0000{}-of-00002.parquet", "default/{}/000{}.parquet", "{}/000{}.parquet"),
        *("plain_text/{}-0000{}-of-00002.parquet", "{}-0000{}-of-00002.parquet"),
    ],
)
def test_layouts_of_the_hub(tmp_path, capsys, file):
    for split, first in (("train", 0), ("test", 4)):
        for shard in (0, 1):
            row = first + shard
            table(tmp_path / file.format(split, shard), {"image": IMAGES[row : row + 1], "label": [shard]})
    (tmp_path / "README.md").write_text("words")
    opened = open_dataset(str(tmp_path))
    assert [opened.read(i) for i in range(2)] == IMAGES[:2] and opened.split == "train" and opened.notes == []
    assert len({*opened.names}) == 2
    assert open_dataset(str(tmp_path), "test").read(1) == IMAGES[5]
    assert open_reader(tmp_path).labels.tolist() == [0, 1]
    assert len(image_set(tmp_path)[0]) == 2 and "only its split train is read" in capsys.readouterr().err


def test_several_sets_in_a_folder_are_refused(tmp_path):
    for name in ("cropped", "full"):
        table(tmp_path / name / "train-0.parquet", {"image": IMAGES[:1]})
    with pytest.raises(InputError, match=r"several data sets \(cropped, full\); name one of them: .*cropped"):
        open_dataset(str(tmp_path))


def test_what_save_to_disk_leaves(tmp_path):
    """An Arrow stream a split, and what `datasets` has cached beside it."""
    rows = [{"bytes": data, "path": None} for data in IMAGES]
    made = pa.table({"image": rows, "label": ["b", "a"] * 3})
    for split, part in (("train", made[:4]), ("test", made[4:])):
        (tmp_path / split).mkdir()
        with pa.ipc.new_stream(str(tmp_path / split / "data-00000-of-00001.arrow"), made.schema) as writer:
            writer.write_table(part, max_chunksize=3)
        (tmp_path / split / "state.json").write_text("{}")
        (tmp_path / split / "cache-5f2.arrow").write_bytes(b"x")
    (tmp_path / "dataset_dict.json").write_text("{}")
    opened = open_dataset(str(tmp_path))
    assert [opened.read(i) for i in range(4)] == IMAGES[:4] and opened.classes == ["a", "b"]
    single = open_dataset(str(tmp_path / "test"))
    assert [single.read(i) for i in range(2)] == IMAGES[4:]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize("name", ["train-0.parquet", "data/train-0.parquet", "x.tar", "a/1.jpg"])
def test_the_pointer_of_a_large_file_is_named(tmp_path, name):
    class_folders(tmp_path / "set", {name: POINTER})
    if name == "a/1.jpg":
        assert main([str(tmp_path / "set"), str(tmp_path / "x.beton")]) == 2
        return
    with pytest.raises(InputError, match="is a Git LFS pointer, not the file itself; fetch that with"):
        open_dataset(str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (("train-00000-of-00003", "train-00002-of-00003"), "train-00001-of-00003"),
        (("00000", "00001", "00003"), "00002"),
    ],
)
@pytest.mark.parametrize("end", ["parquet", "tar"])
def test_a_missing_shard_is_named(tmp_path, there, missing, end):
    for name in there:
        path = tmp_path / f"{name}.{end}"
        tar_of(path, {f"{name}.jpg": b"x"}) if end == "tar" else table(path, {"image": [b"x"]})
    note = f"missing files of a numbered series (1): {missing}.{end}"
    assert open_dataset(str(tmp_path)).notes == [note]
