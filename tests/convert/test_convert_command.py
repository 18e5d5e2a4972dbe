"""The command as it is typed: exit status, one line of error, nothing left behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_images import SHARED, class_folders, image_of, photos
from PIL import Image

from pipelines.convert.command import main, parser
from pipelines.convert.conversion import Bar
from pipelines.formats.beton import open_beton

ROOT = Path(__file__).resolve().parents[2]


def test_the_closing_line_and_the_warnings(tmp_path, capsys):
    photos(tmp_path / "set")
    (tmp_path / "set/class1/001.jpg").write_bytes(b"no image")
    out = tmp_path / "x.beton"
    assert main([str(tmp_path / "set"), str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 11 images (11 JPEG unchanged) in 3 classes, 1 skipped, ")
    assert printed.out.strip().endswith(f"manifest {out}.json")
    assert printed.err == "warning: skipped class1/001.jpg: not an image file of a known kind\n"
    assert open_beton(out).count == 11


def test_files_with_several_pages_or_frames_are_counted(tmp_path, capsys):
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    (tmp_path / "set/a").mkdir(parents=True)
    for end in ("gif", "tif", "webp", "png", "bmp"):
        pictures[0].save(tmp_path / f"set/a/single.{end}")
        if end != "bmp":
            more = {"save_all": True, "append_images": pictures[1:]}
            pictures[0].save(tmp_path / f"set/a/several.{end}", **more)
    out, said = tmp_path / "x.beton", "files have several pages or frames, of which the first was taken\n"
    assert main([str(tmp_path / "set"), str(out)]) == 0
    assert capsys.readouterr().err == f"note: 4 {said}"
    whole = json.loads(Path(f"{out}.json").read_text())
    assert whole["several_frames"] == 4
    for number in (1, 2):
        assert main([str(tmp_path / "set"), str(tmp_path / "y.beton"), "--shard", f"{number}/2"]) == 0
    capsys.readouterr()
    assert main(["--merge", str(tmp_path / "y.beton")]) == 0
    assert capsys.readouterr().err == f"note: 4 {said}"
    assert json.loads((tmp_path / "y.beton.json").read_text()) == whole


def test_the_closing_line_of_a_part_and_of_a_regression_set(tmp_path, capsys):
    photos(tmp_path / "set")
    out = tmp_path / "x.beton"
    assert main([str(tmp_path / "set"), str(out), "--shard", "2/3"]) == 0
    part = tmp_path / "x.part-002-of-003.beton"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{part}: 4 images") and printed.strip().endswith(f"manifest {part}.json")
    assert part.is_file() and Path(f"{part}.json").is_file()
    (tmp_path / "ages.csv").write_text("path,age,score\nset/class0/000.jpg,31,0.5\n")
    assert main([str(tmp_path / "ages.csv"), str(out), "--targets", "age", "score"]) == 0
    assert ": 1 images (1 JPEG unchanged) with age, score, 0 skipped, " in capsys.readouterr().out


def test_every_option_reaches_the_manifest(tmp_path):
    photos(tmp_path / "set", classes=2, each=10)
    options = (
        "--split validation --subset 6 --shuffle-seed 4 --max-resolution 25 --jpeg-quality 70 --workers 2"
    )
    os.rename(tmp_path / "set", tmp_path / "val")
    (tmp_path / "train").mkdir()
    options += " --on-error raise --white-level 4095 --image-column img --label-column cls"
    options += " --jpeg-sampling 4:4:4 --line-art jpeg --only-classes class1 class0"
    assert main([str(tmp_path), str(tmp_path / "x.beton"), *options.split()]) == 0
    manifest = json.loads((tmp_path / "x.beton.json").read_text())
    assert manifest["settings"] == {
        "max_resolution": 25,
        "jpeg_quality": 70,
        "raw_proportion": 0.0,
        "subset": 6,
        "shuffle_seed": 4,
        "on_error": "raise",
        "white_level": 4095,
        "image_column": "img",
        "label_column": "cls",
        "targets": [],
        "max_pixels": 1 << 28,
        "jpeg_sampling": "4:4:4",
        "line_art": "jpeg",
        "only_classes": ["class1", "class0"],
    }
    assert manifest["count"] == 6 and manifest["class_counts"] == [3, 3] and manifest["split"] == "validation"
    assert manifest["stored"]["reencoded"] == 6 and open_beton(tmp_path / "x.beton").widths.max() == 25


def make_bad_sources(root):
    photos(root / "good", classes=2, each=3)
    photos(root / "damaged", classes=1, each=3)
    (root / "damaged/class0/001.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    class_folders(
        root,
        {
            "texts/a/1.jpg": b"one",
            "texts/b/2.jpg": b"two",
            "file.txt": b"x",
        },
    )
    (root / "empty").mkdir()
    (root / "hollow/a").mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), root / "other.parquet")
    (root / "there.beton").write_bytes(b"mine")


BAD = [
    ("gone out.beton", "gone: no such folder or file"),
    ("empty out.beton", "empty: contains no images (looked for .jpg, "),
    ("hollow out.beton", "hollow: no image in any of its 1 class folders"),
    (
        "texts out.beton",
        "none of the 2 files is an image that can be stored; the first, a/1.jpg: not an image",
    ),
    ("damaged out.beton --on-error raise", "class0/001.jpg: "),
    ("file.txt out.beton", "file.txt: names x, and there is no such file"),
    ("other.parquet out.beton", "choose one of its columns with --image-column: a"),
    ("torchvision:Nope out.beton", "torchvision:Nope: not a data set"),
    ("sklearn:faces out.beton", "sklearn:faces: unknown"),
    ("good there.beton", "there.beton: exists; remove it, or replace it with --overwrite"),
    ("good empty", "empty: is a folder; give the name of a file"),
    ("good .", ".: is a folder; give the name of a file"),
    ("--merge .", ".: is a folder; give the name of a file"),
    ("--inspect there.beton --sheet ./there.beton", "there.beton: this is the file to inspect"),
    ("--inspect there.beton --sheet file.txt", "file.txt: exists and isn't a PNG"),
    ("good ''", "OUT.beton is empty: give a value"),
    ("'' out.beton", "SOURCE is empty: give a value"),
    ("good out.beton --webdataset ''", "--webdataset is empty: give a value"),
    ("good file.txt/out.beton", "file.txt: cannot be made (File exists)"),
    ("good file.txt/deeper/out.beton", "cannot be made (Not a directory)"),
    ("good /proc/out.beton", "/proc/out.beton: cannot be written"),
    ("good new/folder/out.beton --subset 7", "--subset 7: there are only 6 images to choose from"),
    ("texts new/folder/out.beton", "none of the 2 files"),
    (
        "good out.beton --only-classes class1 dog",
        "--only-classes dog: the source has no image of such a class; it has (2): class0, class1",
    ),
    ("good out.beton --subset 4 --only-classes class1", "--subset 4: there are only 3 images to choose from"),
    ("good out.beton --subset 0", "--subset 0: must be at least 1"),
    ("good out.beton --subset many", "argument --subset: invalid int value: 'many'"),
    ("good out.beton --split dev", "argument --split: invalid choice: 'dev'"),
    ("good out.beton --split test", "good: has no splits"),
    ("good out.beton --max-resolution 0", "--max-resolution 0: must be within"),
    ("good out.beton --jpeg-quality 101", "--jpeg-quality 101: must be within"),
    ("good out.beton --shuffle-seed -1", "--shuffle-seed -1: must be within 0 and"),
    ("good out.beton --workers 0", "--workers 0: must be at least 1"),
    ("good out.beton --colour", "unrecognized arguments: --colour"),
    ("good", "the following arguments are required: OUT.beton (or --webdataset DIR)"),
]


@pytest.mark.parametrize(("typed", "message"), BAD, ids=[typed for typed, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, typed, message):
    make_bad_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    try:
        status = main(shlex.split(typed))
    except SystemExit as error:  # argparse's own way out
        status = error.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.beton").read_bytes() == b"mine"


@pytest.mark.parametrize("typed", ["{} out.beton", "--verify {}", "--merge {}", "--inspect {}"])
def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, capsys, typed):
    monkeypatch.chdir(tmp_path)
    name = "x" * 300 + ".tar"
    assert main(typed.format(name).split()) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and name in error and "File name too long" in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--workers", "--images-per-tar"])
def test_merging_and_verifying_check_their_options_too(tmp_path, capsys, option):
    photos(tmp_path / "set", classes=2, each=2)
    out = str(tmp_path / "x.beton")
    for part in ("1/2", "2/2"):
        assert main([str(tmp_path / "set"), out, "--shard", part]) == 0
    capsys.readouterr()
    for number in ("0", "-1"):
        assert main(["--merge", out, "--webdataset", str(tmp_path / "tars"), option, number]) == 2
        assert capsys.readouterr().err == f"error: {option} {number}: must be at least 1\n"
        if option == "--workers":
            assert main(["--verify", str(tmp_path / "x.part-001-of-002.beton"), option, number]) == 2
            assert capsys.readouterr().err == f"error: {option} {number}: must be at least 1\n"
    assert not (tmp_path / "tars").exists() and not Path(out).exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--merge x.beton --dry-run --remove-parts", "--dry-run has no effect with --merge"),
        ("--merge x.beton --subset 2", "--subset has no effect with --merge"),
        ("--verify x.beton --webdataset tars", "--webdataset has no effect with --verify"),
        ("--inspect x.beton --workers 2", "--workers has no effect with --inspect"),
    ],
)
def test_options_that_another_task_ignores_are_refused(tmp_path, monkeypatch, capsys, typed, message):
    photos(tmp_path / "set", classes=2, each=2)
    monkeypatch.chdir(tmp_path)
    assert main(["set", "x.beton", "--shard", "1/1"]) == 0
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(typed.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_overwriting_tars_removes_nothing_else(tmp_path, monkeypatch, capsys):
    photos(tmp_path / "set", classes=1, each=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    assert main(["set", "--webdataset", "mine", "--overwrite"]) == 2
    assert "mine: has other files than a conversion's (thesis.txt)" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    for _ in range(2):
        assert main(["set", "--webdataset", "tars", "--overwrite"]) == 0
    for folder in (".", "tars/.."):
        assert main(["set", "--webdataset", folder]) == 2
        assert f"--webdataset {folder}: name a new folder" in capsys.readouterr().err


def test_the_output_that_cannot_be_written_is_the_one_that_is_named(tmp_path, capsys):
    photos(tmp_path / "set", classes=1, each=2)
    (tmp_path / ".tars.part").write_text("in the way")
    both = [str(tmp_path / "x.beton"), "--webdataset", str(tmp_path / "tars")]
    assert main([str(tmp_path / "set"), *both]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/tars: cannot be written (File exists)\n"


def test_tars_of_another_unfinished_conversion_are_not_published(tmp_path):
    """It wrote a beton, too, and its journal is next to that one."""
    photos(tmp_path / "set", classes=1, each=2)
    (tmp_path / ".tars.part").mkdir()
    for name in ("images-000000.tar", "images-000007.idx", "test-000000.tar"):
        (tmp_path / ".tars.part" / name).write_bytes(b"half")
    assert main([str(tmp_path / "set"), "--webdataset", str(tmp_path / "tars")]) == 0
    names = ["images-000000.idx", "images-000000.tar", "manifest.json"]
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == names


def test_overwrite_replaces_and_a_failure_keeps_the_old_one(tmp_path, capsys):
    photos(tmp_path / "set", classes=1, each=3)
    out = tmp_path / "x.beton"
    assert main([str(tmp_path / "set"), str(out)]) == 0
    old = out.read_bytes(), (tmp_path / "x.beton.json").read_bytes()
    (tmp_path / "set/class0/001.jpg").write_bytes(b"")
    assert main([str(tmp_path / "set"), str(out), "--overwrite", "--on-error", "raise"]) == 2
    assert (out.read_bytes(), (tmp_path / "x.beton.json").read_bytes()) == old
    assert main([str(tmp_path / "set"), str(out), "--overwrite"]) == 0
    assert open_beton(out).count == 2 and json.loads((tmp_path / "x.beton.json").read_text())["count"] == 2
    assert "class0/001.jpg: the file is empty" in capsys.readouterr().err


def hear_interrupts() -> None:
    """A job in a script's background is started deaf to Ctrl-C, and so would be what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number, status):
    """Stopped as soon as the unfinished file is there, with 2,000 images still to shrink."""
    photos(tmp_path / "set", classes=40, each=50)
    (tmp_path / "out").mkdir()
    command = [
        sys.executable,
        "-m",
        "pipelines.convert.command",
        "set",
        "out/x.beton",
        "--workers",
        "1",
        "--max-resolution",
        "19",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_interrupts,
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert list((tmp_path / "out").iterdir()) == []
    last = errors.decode().splitlines()[-1]
    said = "interrupted" if number == signal.SIGINT else "terminated"
    assert last == f"{said}: nothing was written"


def test_a_bar_that_a_signal_kept_from_being_made_closes_in_silence():
    Bar.__new__(Bar).close()


def test_no_space_left(tmp_path):
    """A limit on the size of a file: an error from the same write as a full disk's."""
    photos(tmp_path / "set", classes=4, each=50)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from pipelines.convert.command import main; sys.exit(main(['set', 'out.beton']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    estimate, error = done.stderr.splitlines()
    assert estimate.startswith("estimate: 200 images")
    assert error == "error: out.beton: cannot be written (File too large)"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    text = capsys.readouterr().out
    assert error.value.code == 0
    for word in (
        "photos/CLASS/IMAGE.jpg",
        "torchvision:CIFAR10",
        "sklearn:digits",
        "--on-error",
        "byte for byte",
    ):
        assert word in text


def test_help_is_in_full_sentences():
    for action in parser()._actions:
        said = action.help or ""
        assert action.dest == "help" or (said[:1].isupper() and said.endswith(".")), action.dest


def test_real_imagenet_jpegs_keep_their_bytes(tmp_path):
    tar = SHARED / "imagenet-sample/imagenet-1k-one-per-class.tar"
    if not tar.is_file():
        pytest.skip(f"no {tar}")
    import tarfile

    with tarfile.open(tar) as archive:
        members = [member for member in archive if member.isfile()][::20]
        files = {member.name: archive.extractfile(member).read() for member in members}
    class_folders(tmp_path / "set", files)
    assert main([str(tmp_path / "set"), str(tmp_path / "x.beton"), "--on-error", "raise"]) == 0
    manifest, beton = json.loads((tmp_path / "x.beton.json").read_text()), open_beton(tmp_path / "x.beton")
    assert beton.count == len(files) == 50
    assert all(image_of(beton, i) == files[row[0]] for i, row in enumerate(manifest["samples"]))
