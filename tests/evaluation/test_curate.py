"""`lvssl curate`: planted duplicates, foreign images and swapped labels are found; kills, bad input."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lvssl.codes.search import hamming_distances
from lvssl.commands.main import main
from lvssl.evaluation.curate import NOISE, Agreement, Embedded, contradicted, diverse

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CIFAR = SHARED / "cifar10-jpeg/train-00000-of-00001.parquet"


def lvssl(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def save(folder: Path, name: str, image: np.ndarray) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return name


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Path]:
    """Training images of two classes, with an exact and a mirrored copy, and noise; test images of which one
    is a training image."""
    folder, random = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    images = random.integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    images = [np.asarray(Image.fromarray(image).resize((16, 16))) for image in images]
    for i, image in enumerate(images[:50]):
        save(folder, f"train/{i % 2}/{i:02d}.png", image)
    save(folder, "train/0/exact.png", images[6])
    save(folder, "train/1/mirrored.png", np.ascontiguousarray(images[9][:, ::-1]))
    for i, image in enumerate(images[50:]):
        save(folder, f"test/{i % 2}/{i}.png", image)
    save(folder, "test/0/leak.png", np.ascontiguousarray(images[20][:, ::-1]))
    return folder / "train", folder / "test"


def test_planted_copies_are_found_within_and_between_sets(run, planted, tmp_path, capsys):
    train, test = planted
    arguments = ["curate", run, "--train", train, "--test", test, "--out", tmp_path / "c", "--cosine", 0.999]
    assert lvssl(*arguments, "--subset", 5) == 0
    pairs = {
        (r["set"], r["name"], r["other_set"], r["other_name"]) for r in read(tmp_path / "c/duplicates.csv")
    }
    assert pairs == {
        ("train", "0/06.png", "train", "0/exact.png"),
        ("train", "1/09.png", "train", "1/mirrored.png"),
        ("test", "0/leak.png", "train", "0/20.png"),
    }
    scores = [float(row["uncertainty"]) for row in read(tmp_path / "c/outliers.csv")]
    assert len(scores) == 63 and scores == sorted(scores, reverse=True)
    assert len({row["name"] for row in read(tmp_path / "c/subset.csv")}) == 5
    labels = read(tmp_path / "c/labels.csv")
    assert labels and all(row["class"] != row["neighbours_class"] for row in labels)
    page = (tmp_path / "c/curate.html").read_text()
    assert f"<h1>{train.parent.name}, curated with untrained</h1>" in page
    assert page.count("data:image/png") > 100 and "leak.png" in page and "://" not in page
    before = (tmp_path / "c/train.lvcodes").stat().st_mtime_ns
    assert lvssl(*arguments) == 0  # what is embedded isn't embedded again
    assert (tmp_path / "c/train.lvcodes").stat().st_mtime_ns == before
    assert lvssl(*arguments, "--overwrite") == 0
    assert (tmp_path / "c/train.lvcodes").stat().st_mtime_ns != before


def test_other_images_of_the_same_names_are_embedded_anew(run, planted, tmp_path):
    train, out = tmp_path / "train", tmp_path / "c"
    shutil.copytree(planted[0], train)
    arguments = ["curate", run, "--train", train, "--out", out, "--cosine", 0.999]
    assert lvssl(*arguments) == 0 and len(read(out / "duplicates.csv")) == 2
    shutil.copyfile(train / "1/07.png", train / "1/mirrored.png")
    assert lvssl(*arguments) == 0
    assert {(r["name"], r["other_name"]) for r in read(out / "duplicates.csv")} == {
        ("0/06.png", "0/exact.png"),
        ("1/07.png", "1/mirrored.png"),
    }


def test_classes_that_neighbours_do_not_share_are_said_to_be_doubtful_as_a_whole(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    labels = np.arange(200) % 5
    np.save(tmp_path / "train-labels.npy", labels)
    for shift, says in ((0, True), (20, False)):  # without clusters, and with one cluster a class
        np.save(tmp_path / "train.npy", x + shift * np.eye(8, dtype=np.float32)[labels])
        assert lvssl("curate", tmp_path / "train.npy", "--out", tmp_path / str(shift)) == 0
        assert ("more neighbours of another class" in capsys.readouterr().err) is says


def test_a_folder_without_classes_and_with_a_damaged_image(run, planted, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(planted[0].rglob("*.png"))[:12]):
        (flat / f"{i}.png").write_bytes(path.read_bytes() if i != 3 else b"\x89PNG broken")
    arguments = ["curate", run, "--train", flat, "--out", tmp_path / "c"]
    assert lvssl(*arguments) == 2 and "3.png" in capsys.readouterr().err
    assert lvssl(*arguments, "--on-error", "skip") == 0
    before = (tmp_path / "c/train.lvcodes").stat().st_mtime_ns
    assert lvssl(*arguments, "--on-error", "keep") == 0  # it can't be kept, and isn't embedded again either
    assert (tmp_path / "c/train.lvcodes").stat().st_mtime_ns == before
    assert not (tmp_path / "c/labels.csv").exists()
    assert len(read(tmp_path / "c/subset.csv")) == 11
    embedded = tmp_path / "c/train.lvcodes"
    written = embedded.stat().st_mtime_ns
    assert lvssl(*arguments, "--on-error", "skip") == 0 and embedded.stat().st_mtime_ns == written
    for name in ("new.png", "3.png"):  # added, and repaired
        (flat / name).write_bytes((flat / "0.png").read_bytes())
        assert lvssl(*arguments, "--on-error", "skip") == 0
        assert name in {row["name"] for row in read(tmp_path / "c/subset.csv")}


def test_a_damaged_image_shifts_no_class(run, planted, tmp_path):
    train = tmp_path / "train"
    shutil.copytree(planted[0], train)
    (train / "0/02.png").write_bytes(b"\x89PNG broken")
    assert lvssl("curate", run, "--train", train, "--out", tmp_path / "c", "--on-error", "skip") == 0
    rows = read(tmp_path / "c/outliers.csv")
    assert len(rows) == 51 and all(row["class"] == row["name"].split("/")[0] for row in rows)


def test_votes_on_a_label_are_weighted_by_cosine():
    names, labels = list("abcd"), np.array([0, 1, 0, 0])
    one = Embedded("train", names, labels, ["cat", "dog"], np.zeros((4, 2)), np.zeros(4, np.float32))
    rows = np.array([[1, 2, 3], [0, 2, 3], [3, 0, 1], [2, 0, 1]])
    cosines = np.tile(np.array([0.6, 0.2, -0.9], np.float32), (4, 1))  # what is opposite has no vote
    found = contradicted(one, rows, cosines, 10)
    assert found.lines == [["b", "dog", "cat", 0.0, 1.0], ["a", "cat", "dog", 0.25, 0.75]]


def test_embeddings_are_duplicates_from_a_higher_cosine_on(tmp_path):
    """By NumPy over all pairs, of features of different scales, one of which is constant."""
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 8)).astype(np.float32)
    x[1::2] = x[::2] + random.uniform(0, 0.5, (30, 1)).astype(np.float32) * random.normal(size=(30, 8))
    x = x * np.array([1, 30, 1, 0.1, 1, 1, 5, 0], np.float32) + 7
    z = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 1e-3, x.std(axis=0), 1)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    cosines = np.triu(z @ z.T, 1)
    assert np.abs(cosines - 0.98).min() > 1e-4 and (np.abs(cosines - 0.94) < 0.04).any()
    np.save(tmp_path / "train.npy", x)
    assert lvssl("curate", tmp_path / "train.npy", "--out", tmp_path / "c") == 0
    found = {(int(row["name"]), int(row["other_name"])) for row in read(tmp_path / "c/duplicates.csv")}
    assert found == {*zip(*np.nonzero(cosines >= 0.98))}


def test_thumbnails_agree_for_copies_and_not_for_what_a_set_has_in_common():
    """Against the definition, written out; of images that share a pattern a re-encoded, or mirrored, copy."""
    random = np.random.default_rng(0)
    common = 60 * np.sin(np.arange(64))  # what all images have: raw correlation is high between any two
    images = np.clip(128 + common + 15 * random.normal(size=(400, 64)), 0, 255).astype(np.uint8)
    noisy = np.clip(images[:20] + random.normal(size=(20, 64)), 0, 255).astype(np.uint8)
    turned = noisy.reshape(20, 8, 8)[:, :, ::-1].reshape(20, 64)
    agreement, rows = Agreement.of(images), np.arange(20)
    for copies in (noisy, turned):
        assert agreement(images, rows, copies, rows).min() > 0.95
    others = agreement(images, rows, images, rows + 100)
    assert others.max() < 0.6 and np.corrcoef(images[0], images[100])[0, 1] > 0.8

    def level(x: np.ndarray) -> np.ndarray:
        return x.astype(float) - x.mean(axis=-1, keepdims=True)

    both = np.concatenate([level(images), level(images).reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64)])
    precision = np.linalg.inv(np.cov(both, rowvar=False) + NOISE * np.eye(64))
    x, y = level(images[0]) - both.mean(axis=0), level(images[100]) - both.mean(axis=0)
    z = level(images[100]).reshape(8, 8)[:, ::-1].ravel() - both.mean(axis=0)
    wanted = [x @ precision @ v / np.sqrt(x @ precision @ x * (v @ precision @ v)) for v in (y, z)]
    assert others[0] == pytest.approx(max(wanted), abs=1e-4)
    black = np.zeros((2, 64), np.uint8)
    assert agreement(black, [0], black, [1])[0] == pytest.approx(1)


def test_bad_settings_are_one_line(run, planted, tmp_path, capsys):
    for options, message in [
        (["--cosine", 0], "--cosine must be in (0, 1], got 0"),
        (["--subset", -1], "--subset must be at least 0, got -1"),
        (["--crops", 0.75, "--pixels", 0], "--crops compares pixels, which --pixels 0 leaves out"),
        (["--train", tmp_path / "gone"], "gone"),
        (["--out", tmp_path / "no" / "c"], "no such folder to make c in"),
    ]:
        assert lvssl("curate", run, "--train", planted[0], *options) == 2
        assert message in capsys.readouterr().err


def test_crops_that_arent_looked_for_are_noted(tmp_path, capsys):
    np.save(tmp_path / "train.npy", np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    for options, count in (([], 0), (["--crops", 0.75], 1)):
        assert lvssl("curate", tmp_path / "train.npy", "--out", tmp_path / "c", *options) == 0
        assert capsys.readouterr().err.count("note: --crops compares pixels, so it is ignored here") == count


def test_a_diverse_subset_never_has_a_row_twice_however_many_are_copies():
    assert diverse(np.array([[1], [1], [7], [1]], np.uint8), 4) == [0, 2, 1, 3]


def test_a_diverse_subset_is_farthest_first():
    codes = np.random.default_rng(0).integers(0, 256, (200, 4), dtype=np.uint8)
    chosen, distances = diverse(codes, 20), hamming_distances(codes, codes)
    assert chosen[0] == 0
    for n in range(1, 20):
        nearest = distances[:, chosen[:n]].min(axis=1)
        assert nearest[chosen[n]] == nearest.max()


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason="CIFAR-10's JPEG copy isn't there")
def test_re_encoded_and_mirrored_copies_of_photographs(tmp_path, capsys):
    """5,000 images, 100 of them again at JPEG quality 50, 100 mirrored and re-encoded; 100 labels swapped."""
    table = pq.read_table(CIFAR).slice(0, 5000).to_pydict()
    random, truth = np.random.default_rng(0), set()
    chosen = random.permutation(5000)
    swapped = set(chosen[200:300].tolist())
    for i, (image, label) in enumerate(zip(table["image"], table["label"])):
        where = (label + 1 + i % 9) % 10 if i in swapped else label
        path = tmp_path / "set" / str(where) / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image["bytes"])
        if i in set(chosen[:200].tolist()):
            pixels = np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
            mirrored = i in set(chosen[100:200].tolist())
            again = Image.fromarray(np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels)
            again.save(path.with_name(f"{i:05d}-copy.jpg"), quality=50)
            truth.add(f"{where}/{i:05d}")
    run = tmp_path / "run"
    assert lvssl("pretrain", "--preset", "cifar10-small", "--data", tmp_path / "set", "--source", "folder",
                 "--epochs", 1, "--family", "none", "--out", run) == 0  # fmt: skip
    assert lvssl("curate", run) == 0
    pairs = read(run / "curate/duplicates.csv")
    found = {r["name"].removesuffix(".jpg").removesuffix("-copy") for r in pairs
             if r["name"].removesuffix(".jpg") + "-copy.jpg" == r["other_name"]
             or r["other_name"].removesuffix(".jpg") + "-copy.jpg" == r["name"]}  # fmt: skip
    recall, precision = len(found & truth) / len(truth), len(found) / len(pairs)
    labels = [row["name"] for row in read(run / "curate/labels.csv")][:500]
    hits = sum(int(Path(name).stem.split("-")[0]) in swapped for name in labels)
    with capsys.disabled():
        print(f"recall {recall:.3f}, precision {precision:.3f}, swapped labels among the first 500: {hits}")
    assert recall >= 0.95 and precision >= 0.95  # CIFAR-10's own near-duplicates count as wrong
    assert hits > 2 * 500 * len(swapped) / 5200  # twice what chance would give


def test_a_crop_agrees_with_its_image_and_with_no_other():
    """One in three of them mirrored."""
    random = np.random.default_rng(3)
    coarse = random.integers(0, 256, (80, 9, 9, 3), dtype=np.uint8)
    images = [Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC).convert("L") for one in coarse]
    crops = []
    for i, image in enumerate(images):
        left, top = random.integers(0, 8, 2)
        part = image.crop((left, top, left + 57, top + 57))
        crops.append(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 3 == 0 else part)
    small = [np.stack([np.asarray(one.resize((16, 16))).ravel() for one in some]) for some in (images, crops)]
    agreement, every = Agreement.of(small[0]), np.arange(80)
    both = agreement.of_crops(small[0], every, small[1], every)
    turned = agreement.of_crops(small[1], every, small[0], every)
    assert np.array_equal(both, turned) and both.min() > 0.75
    assert agreement(small[0], every, small[1], every).max() < 0.89  # as a copy it isn't found
    assert agreement.of_crops(small[0], every, small[1], np.roll(every, 1)).max() < 0.75


def test_crops_are_found_where_they_are_looked_for(run, tmp_path, capsys):
    random, train = np.random.default_rng(3), tmp_path / "train"
    for i in range(40):
        coarse = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
        save(train, f"{i:02d}.png", np.asarray(image))
        if i == 7:
            save(train, "part.png", np.asarray(image.crop((0, 5, 57, 62)).resize((64, 64))))
    found = {}
    for crops in (0, 0.75):
        out = ["--out", tmp_path / f"c{crops}", "--crops", crops, "--pixels", 1, "--subset", 2]
        assert lvssl("curate", run, "--train", train, *out) == 0
        rows = read(tmp_path / f"c{crops}/duplicates.csv")
        found[crops] = {(r["name"], r["other_name"]) for r in rows}
    assert ("07.png", "part.png") in found[0.75] and not found[0]
    assert lvssl("curate", run, "--train", train, "--crops", 2) == 2
    assert "--crops must be in [0, 1], got 2" in capsys.readouterr().err
