"""A set in many files is the set of one: the same batches, names and codes; and gaps are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lvssl.codes.file import open_codes
from lvssl.commands.main import main
from lvssl.runs.run import read_config
from lvssl.settings.fields import identity
from lvssl.settings.stages import KnnSettings
from pipelines.convert.command import main as convert_beton
from pipelines.convert.conversion import ConvertOptions, Settings, convert
from pipelines.convert.merge import merge
from pipelines.datasets.beton import stored_names
from pipelines.datasets.opening import open_dataset
from pipelines.datasets.parts import are_there, files_of, parts_of, unquoted
from pipelines.decode import DamagedSample, open_reader
from pipelines.errors import InputError
from pipelines.formats.beton import JPEG
from pipelines.formats.manifest import content_of, manifest_path
from pipelines.loader import LoaderSettings, TwoViewLoader
from pipelines.views import ViewSettings

PARTS = 11  # more than nine, so that the order of numbers isn't that of letters once the noughts are gone


@pytest.fixture(scope="module")
def cut(beton, tmp_path_factory) -> tuple[Path, Path]:
    """The images of `beton`, merged, and the pattern of the parts that it was merged from."""
    folder = tmp_path_factory.mktemp("parts")
    for k in range(1, PARTS + 1):
        options = ConvertOptions(shard=(k, PARTS))
        convert(str(beton.parent / "pictures"), folder / "set.beton", Settings(), options=options)
    merge(folder / "set.beton")
    return folder / "set.beton", folder / f"set.part-*-of-{PARTS:03d}.beton"


def batches(path: Path, **options) -> list[tuple]:
    with TwoViewLoader(
        open_reader(path), ViewSettings(resolution=24), LoaderSettings(8, **options)
    ) as loader:
        return [(b.views.numpy().tobytes(), b.labels.tolist(), b.indices.tolist()) for b in loader]


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_parts_give_the_batches_of_the_merged_file(cut, order):
    whole, parts = cut
    assert batches(parts, seed=3, workers=3, order=order) == batches(whole, seed=3, workers=1, order=order)


def test_parts_are_the_merged_set_in_all_that_is_known_of_it(cut):
    whole, parts = map(open_reader, cut)
    for name in ("labels", "heights", "widths"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), name)
    assert parts.classes == whole.classes and stored_names(cut[1]) == stored_names(cut[0])
    manifest = manifest_path(cut[0])  # is read without parsing its rows
    head = json.loads(manifest.read_text())
    assert len(head.pop("samples")) == len(whole) and content_of(manifest) == head
    for one, other in zip(map(open_dataset, map(str, cut)), (whole, parts)):
        assert list(one.names) == stored_names(cut[0]) and one.classes == whole.classes
        for index in range(len(whole)):
            stored = one.read(index)
            assert np.array_equal(stored, other.encoded(0, index)) or stored == other.encoded(0, index)


def test_a_damaged_image_in_one_of_many_files_is_named_by_its_row(cut, tmp_path, monkeypatch):
    """Its row is what is replaced: of the whole call, though files are opened a few at a time."""
    for path in cut[1].parent.glob("set.part-*"):
        shutil.copy(path, tmp_path)
    files = parts_of(tmp_path / cut[1].name)
    ends = np.cumsum([len(open_reader(file)) for file in files])
    reader = open_reader(tmp_path / cut[1].name)
    victim = int(np.flatnonzero(reader.file.modes == JPEG)[-9])
    with open(files[int(np.searchsorted(ends, victim, side="right"))], "r+b") as file:
        size = int(reader.file.sizes[victim])
        file.seek(int(reader.file.offsets[victim]) + size // 3)
        file.write(bytes(size - size // 3))
    monkeypatch.setattr("pipelines.decode.beton.most_open", lambda: 1)
    reader = open_reader(tmp_path / cut[1].name)
    indices = np.arange(len(reader))[::-1].copy()
    boxes = np.tile(np.array([[[0, 0, 8, 8]]], np.int32), (len(indices), 1, 1))
    with pytest.raises(DamagedSample) as damaged:
        reader.crops(indices, boxes, np.empty((len(indices), 1, 8, 8, 3), np.uint8))
    assert (damaged.value.row, damaged.value.index) == (len(indices) - 1 - victim, victim)


def test_blocks_of_the_quasi_random_order_lie_within_a_part(cut):
    parts, counts = open_reader(cut[1]), [len(open_reader(path)) for path in parts_of(cut[1])]
    assert len({*parts.storage_blocks().tolist()}) == PARTS  # of less than 2 MB each
    assert np.bincount(parts.storage_blocks()).tolist() == counts
    seen = [index for _, _, indices in batches(cut[1], order="quasi-random") for index in indices]
    assert len({*seen}) == len(seen) == len(parts) // 8 * 8


def test_a_run_in_quasi_random_order_is_not_resumed_on_files_cut_otherwise(cut, tmp_path, capsys):
    small = ["--preset", "digits", "--backbone", "tiny", "--epochs", "1", "--batch-size", "8"]
    small += ["--resolution", "16", "--device", "cpu", "--out"]
    for order, status in (("random", 0), ("quasi-random", 2)):
        out = str(tmp_path / order)
        assert main(["pretrain", "--data", str(cut[1]), "--order", order, *small, out]) == 0
        assert main(["pretrain", "--resume", "--data", str(cut[0]), "--out", out]) == status
        assert main(["pretrain", "--resume", "--data", str(cut[1]), "--out", out]) == 0
        assert ("its files are split differently" in capsys.readouterr().err) == (status == 2)


def test_a_pattern_without_quotes_is_named(cut, tmp_path, capsys):
    files = [*map(str, parts_of(cut[1]))]
    assert unquoted(["--data", files[0], "--out", files[1]]) == ""
    for command in (lambda: main(["pretrain", "--data", *files]), lambda: convert_beton([*files, "x.beton"])):
        with pytest.raises(SystemExit) as ended:
            command()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and f"in quotes, such as '{cut[0].parent}/set.part-*.beton'" in said


def test_paths_with_a_colon_and_lists_from_windows_are_read(cut, tmp_path):
    (tmp_path / "a:b").symlink_to(cut[0].parent)
    pattern = tmp_path / "a:b" / cut[1].name
    assert len(parts_of(pattern)) == PARTS and len(open_reader(pattern)) == len(open_reader(cut[0]))
    listed = tmp_path / "parts.txt"
    listed.write_bytes(f"\ufeffa:b/{parts_of(cut[1])[0].name}\r\n".encode())
    assert len(open_reader(listed)) > 0


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("empty.txt", "names no files"),
        ("folders.txt", "a folder, not a file"),
        ("0.jpg", "pass their folder"),
        ("*.jpg", "pass their folder"),
    ],
)
def test_what_is_no_set_is_said(tmp_path, path, said):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "folders.txt").write_text("../\n")
    for name in ("0.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=said):
        open_reader(tmp_path / path)


def test_a_list_and_a_range_name_parts_too(cut, tmp_path):
    whole, parts = cut
    paths = parts_of(parts)
    (tmp_path / "parts.txt").write_text("".join(f"{path}\n\n" for path in paths[:2]))
    some = [
        tmp_path / "parts.txt",
        whole.with_name("set.part-{001..002}-of-011.beton"),
        whole.with_name("{set.part-001,set.part-002}-of-011.beton"),
    ]
    for path in some:
        assert files_of(path) == paths[:2] and are_there(path)
        np.testing.assert_array_equal(open_reader(path).labels, open_reader(whole).labels[: 53 * 2 // 11])
    with pytest.raises(InputError, match=r"set\.part-012-of-011\.beton: no such file"):
        open_reader(whole.with_name("set.part-{010..012}-of-011.beton"))


def test_a_pattern_follows_numbers_and_names_a_gap(tmp_path):
    def made(*names: str) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        return folder

    folder = made("a-9.beton", "a-10.beton", "a-11.beton", "b.beton")
    assert [path.name for path in parts_of(folder / "a-*.beton")] == ["a-9.beton", "a-10.beton", "a-11.beton"]
    assert len(parts_of(folder / "*.beton")) == 4  # no series
    for names, pattern, missing in (
        (["a-00.tar", "a-01.tar", "a-04.tar"], "*.tar", "2 of 5 parts are missing: a-02.tar, a-03.tar"),
        (["x.part-001-of-003.beton", "x.part-002-of-003.beton"], "*", "1 of 3 .*: x.part-003-of-003.beton"),
        (["x.part-002-of-003.beton"], "*", "2 of 3 .*: x.part-001-of-003.beton, x.part-003-of-003.beton"),
        (["t-00000-of-00003.parquet", "t-00001-of-00003.parquet"], "*", "t-00002-of-00003.parquet"),
        (["x.part-001-of-003.beton", "x.part-002-of-002.beton"], "*", "its parts are of 002 and 003"),
        (["x.part-001-of-001.beton", "x.beton"], "*", "matches x.beton and a part of it"),
        (["x.beton"], "y*.beton", "no name there fits"),
    ):
        with pytest.raises(InputError, match=missing):
            parts_of(made(*names) / pattern)
    assert len(parts_of(made("t-20240101.tar", "t-20240215.tar") / "*.tar")) == 2  # dates are no series
    with pytest.raises(InputError, match="twice"):
        parts_of(folder / "{b,b}.beton")


def test_a_part_of_another_conversion_is_named(cut, beton, tmp_path):
    parts = cut[1]
    for path in parts_of(parts):
        shutil.copy(path, tmp_path), shutil.copy(f"{path}.json", tmp_path)
    victim = tmp_path / "set.part-004-of-011.beton"
    pattern = tmp_path / parts.name
    pictures = tmp_path / "pictures"
    shutil.copytree(beton.parent / "pictures", pictures)

    def refused(what: str, **settings) -> None:
        options = ConvertOptions(overwrite=True)
        convert(str(pictures), victim, Settings(**settings), options=options)
        with pytest.raises(InputError, match=rf"{victim.name}: isn't of the same set as .*: {what}"):
            open_reader(pattern)

    refused("its max_resolution is 20, not None", max_resolution=20)
    (pictures / "class0").rename(pictures / "other")
    refused(r"its classes differ \(2\): class0, other")
    victim.with_name(f"{victim.name}.json").unlink()
    with pytest.raises(InputError, match=f"{victim.name}: .*it has no manifest"):
        open_reader(pattern)
    victim.unlink()
    with pytest.raises(InputError, match=f"1 of 11 parts are missing: {victim.name}"):
        open_reader(pattern)


def test_a_damaged_image_is_named_by_its_part(cut, tmp_path):
    parts = parts_of(cut[1])
    for path in parts:
        shutil.copy(path, tmp_path), shutil.copy(f"{path}.json", tmp_path)
    reader = open_reader(tmp_path / cut[1].name)
    inside = open_reader(parts[6])
    at = int(np.flatnonzero(inside.file.modes == JPEG)[-1])
    index = at + sum(len(open_reader(path)) for path in parts[:6])
    with open(tmp_path / parts[6].name, "r+b") as file:
        file.seek(int(inside.file.offsets[at]))
        file.write(b"\0" * int(inside.file.sizes[at]))
    box, out = np.array([[[0, 0, 8, 8]]], np.int32), np.empty((1, 1, 8, 8, 3), np.uint8)
    with pytest.raises(InputError, match=f"{parts[6].name}: sample {at} can't be decoded") as caught:
        reader.crops(np.array([index]), box, out)
    assert caught.value.index == index
    os.truncate(tmp_path / parts[6].name, 5000)
    with pytest.raises(InputError, match=f"{parts[6].name}: was cut from"):
        reader.crops(np.array([index]), box, out)
    reader.crops(np.array([0]), box, out)  # another part's


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import numpy as np
from pipelines.datasets.opening import open_dataset
from pipelines.decode import open_reader
from pipelines.loader import evaluation_batches
from pipelines.views import ViewSettings
for path in sys.argv[1:]:
    source, view = open_reader(path), ViewSettings(resolution=8)
    found = [len(crops) for crops, _ in evaluation_batches(source, view, workers=2)]
    boxes = np.tile(np.array([0, 0, 8, 8], np.int32), (len(source), 1, 1))
    out = np.empty((2, len(source), 1, 8, 8, 3), np.uint8)
    order = np.random.default_rng(0).permutation(len(source))
    source.crops(np.arange(2400), boxes, out[0])
    source.crops(order, boxes, out[1])  # each image in another file than the last
    assert (out[0][order] == out[1]).all()
    again = open_dataset(path)
    print(sum(found), len({again.read(i) for i in range(len(again.labels))}))
"""


def test_more_parts_than_files_may_be_open(beton, tmp_path):
    """1,200 files, of which a process may have 256 open: betons and tars."""
    first = next((beton.parent / "pictures" / "class1").glob("*.jpg"))
    for name in ("class0", "class1"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        shutil.copy(first, tmp_path / "pictures" / name / "0.jpg")
    options = ConvertOptions(webdataset=tmp_path / "shards", images_per_tar=2)
    convert(str(tmp_path / "pictures"), tmp_path / "x.beton", Settings(), options=options)
    files = {end: next((tmp_path / "shards").glob(f"*.{end}")) for end in ("tar", "idx")}
    files |= {end: tmp_path / f"x.{end}" for end in ("beton", "beton.json")}
    for end, file in files.items():
        folder = tmp_path / ("betons" if "beton" in end else "tars")
        folder.mkdir(exist_ok=True)
        for k in range(1200):
            os.link(file, folder / f"{k:04d}.{end}")
    run = [sys.executable, "-c", MANY, str(tmp_path / "betons/*.beton"), str(tmp_path / "tars/*.tar")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2400 1\n" * 2


def test_a_run_on_a_set_with_a_name_goes_on_and_is_measured_from_any_folder(digits, tmp_path, monkeypatch):
    """The name used to be taken for a path in the folder of the pretraining."""
    run, small = str(tmp_path / "run"), ["--preset", "digits", "--epochs", "1", "--threads", "1"]
    assert main(["pretrain", *small, "--data", "sklearn:digits", "--out", run]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--out", run, "--resume"]) == 0
    assert main(["knn", run, "--test", str(digits["test"])]) == 0
    assert read_config(Path(run))[0].data == Path("sklearn:digits")
    assert identity(KnnSettings(Path("run"), train=Path("sklearn:digits")))["train"] == "sklearn:digits"


@pytest.mark.slow
def test_commands_take_parts_for_the_merged_file(lvssl, digits, tmp_path):
    """Training, codes, kNN and resuming: whether a set is one file or three makes no difference."""
    for k in (1, 2, 3):
        convert("sklearn:digits", tmp_path / "train.beton", options=ConvertOptions(shard=(k, 3)))
    merge(tmp_path / "train.beton")
    for end in ("", ".json"):
        shutil.copy(f"{digits['test']}{end}", tmp_path / f"test.beton{end}")

    def run(*arguments: object, status: int = 0) -> str:
        done = lvssl(*arguments, cwd=tmp_path)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    sets = {"whole": "train.beton", "parts": "train.part-*.beton"}
    for name, data in sets.items():
        run("pretrain", "--preset", "digits", "--epochs", 1, "--data", data, "--out", name)
        run("encode", "whole", "--images", data, "--out", f"{name}.lvcodes", "--no-fit")
        run("knn", name)
    figures = [json.loads((tmp_path / name / "knn.json").read_text()) for name in sets]
    assert figures[0]["results"] == figures[1]["results"]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in sets
    ]
    assert losses[0] == losses[1]
    one, other = (open_codes(tmp_path / f"{name}.lvcodes") for name in sets)
    np.testing.assert_array_equal(one.rows, other.rows)
    assert list(one.names) == list(other.names)
    run("pretrain", "--resume", "--out", "parts", "--data", "train.beton")  # the same set
    (tmp_path / "train.part-002-of-003.beton").unlink()
    said = run("pretrain", "--resume", "--out", "parts", "--data", sets["parts"], status=2)
    assert "train.part-002-of-003.beton" in said and "missing" in said
    said = run(
        "pretrain", "--resume", "--out", "parts", "--data", "train.part-{001,003}-of-003.beton", status=2
    )
    assert "images, not" in said
