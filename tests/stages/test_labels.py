"""Subsets have exactly the images they should have, and lists are matched by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lvssl.runs.labels import (
    LabelledDataset,
    Subset,
    balanced,
    check_pair,
    labelled_rows,
    open_labelled,
    rows_by_name,
    sibling_test_set,
    split,
)
from pipelines.errors import InputError
from pipelines.formats.manifest import manifest_path, read_manifest


def test_the_test_set_beside_the_folder_that_one_is_in(tmp_path, monkeypatch):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "train")
    assert sibling_test_set(Path()) == tmp_path / "test"


def of_classes(classes: np.ndarray) -> LabelledDataset:
    answers = torch.from_numpy(classes)
    return LabelledDataset(Path("train.beton"), None, answers, int(answers.max()) + 1)


@pytest.fixture(scope="module")
def imagenet() -> np.ndarray:
    """1,281,167 labels in 1,000 classes: 895 of 1,300 images and smaller ones, as ILSVRC2012 has them."""
    sizes = np.full(1000, 1300)
    sizes[895:] = 1300 - 568 * np.linspace(1, 0.05, 105) ** 2.35
    sizes[950] += 1_281_167 - sizes.sum()
    assert sizes.sum() == 1_281_167 and sizes.min() == 732 and sizes.max() == 1300
    return np.random.default_rng(0).permutation(np.repeat(np.arange(1000), sizes))


@pytest.mark.parametrize("share, count, a_class", [(0.01, 12_811, {12, 13}), (0.1, 128_116, {128, 129})])
def test_imagenet_subsets_have_the_published_counts(imagenet, share, count, a_class):
    rows = labelled_rows(of_classes(imagenet), share, None, seed=0)
    assert len(rows) == len(np.unique(rows)) == count
    assert set(np.bincount(imagenet[rows], minlength=1000)) == a_class
    other = labelled_rows(of_classes(imagenet), share, None, seed=1)
    assert len(other) == count and len(np.intersect1d(rows, other)) < 0.2 * count
    fewer = np.bincount(imagenet[rows], minlength=1000) == min(a_class)
    also = np.bincount(imagenet[other], minlength=1000) == min(a_class)
    assert (fewer != also).any(), "which classes have one fewer is drawn too"


def test_a_share_is_rounded_down_and_its_last_bit_doesnt_matter():
    for percent, count in ((10, 30), (10, 50_000), (29, 100), (57, 100), (7, 2900), (29, 101)):
        rows = labelled_rows(of_classes(np.arange(count) % 3), percent / 100, None, seed=0)
        assert len(rows) == percent * count // 100


def test_small_classes_give_all_they_have_and_the_rest_is_shared():
    classes = np.array([0] * 100 + [1] * 3 + [2] * 50)
    counts = np.bincount(classes[balanced(classes, 43, seed=0)])
    assert counts.tolist() == [20, 3, 20]
    assert np.array_equal(balanced(classes, 43, 0), balanced(classes, 43, 0))
    assert balanced(classes, 153, 0).tolist() == list(range(153)) and len(balanced(classes, 0, 0)) == 0


def test_fewer_images_than_classes_are_refused():
    with pytest.raises(
        InputError, match=r"--label-fraction 0.01: 2 of 200 images are fewer than one for each of 10"
    ):
        labelled_rows(of_classes(np.arange(200) % 10), 0.01, None, seed=0)


def test_held_out_images_are_others_and_leave_every_class_one():
    classes = np.array([0] * 40 + [1] * 40 + [2])
    fitted, held = split(of_classes(classes), 0.1, seed=0)
    assert sorted([*fitted, *held]) == list(range(81)) and 80 in fitted and len(held) in (7, 8)
    fitted, held = split(of_classes(np.arange(10)), 0.5, seed=0)
    assert len(held) == 0 and len(fitted) == 10
    drawn = [split(of_classes(np.arange(90) % 3), 0.1, seed)[1].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_list_of_names_is_matched_against_the_manifest(digits, tmp_path):
    train = open_labelled(digits["train"])
    names = read_manifest(manifest_path(digits["train"]))[1]["name"]
    listed = tmp_path / "1percent.txt"
    listed.write_text("\n".join([names[700], names[3], "", names[40]]) + "\n")
    assert labelled_rows(train, 1.0, listed, seed=0).tolist() == [3, 40, 700]
    for content, message in [
        (f"{names[3]}\nnobody.jpg\n", "1 of its 2 names are not in .*'nobody.jpg'"),
        ("\n", "0 of its 0 names"),
        (f"{names[3]}\n{names[3]}\n", "names an image twice"),
    ]:
        listed.write_text(content)
        with pytest.raises(InputError, match=message):
            labelled_rows(train, 1.0, listed, seed=0)
    with pytest.raises(InputError, match=r"no\.txt: can't be read as a list"):
        labelled_rows(train, 1.0, tmp_path / "no.txt", seed=0)


def test_simclrs_lists_name_files_without_their_folder():
    names = ["n01440764/n01440764_10026.JPEG", "n01440764/a.JPEG", "n01443537/a.JPEG"]
    known = rows_by_name(names)
    assert known["n01440764_10026.JPEG"] == known["n01440764/n01440764_10026.JPEG"] == 0
    assert known["a.JPEG"] == -1 and known["n01443537/a.JPEG"] == 2


def test_a_part_keeps_the_outputs_of_the_whole_and_its_own_pixels(digits):
    train = open_labelled(digits["train"])
    rows = np.flatnonzero(train.answers.numpy() == 2)[:5]
    part = train.only(rows)
    assert part.outputs == 10 and part.answers.tolist() == [2] * 5 and len(part) == 5
    out = [np.empty((2, 1, 8, 8, 3), np.uint8) for _ in range(2)]
    boxes = np.tile(np.array([[[0, 0, 8, 8]]], np.int32), (2, 1, 1))
    part.source.crops(np.array([4, 0]), boxes, out[0])
    train.source.crops(rows[[4, 0]], boxes, out[1])
    assert np.array_equal(*out) and out[0].any()
    inner = Subset(part.source, np.array([3, 1]))  # no part of a part: facts are looked up in the whole
    assert inner.source is train.source and inner.rows.tolist() == rows[[3, 1]].tolist()
    assert inner.labels.tolist() == [2, 2] and part.source.sizes(np.array([0]))[0].tolist() == [8]
    for one, index in ((part.source, 1), (inner, 1)):  # both are image rows[1]
        assert np.array_equal(one.encoded(0, index), train.source.encoded(0, int(rows[1])))


def test_what_a_set_does_not_have_is_refused(digits, tmp_path):
    with pytest.raises(InputError, match=r"no float target 'age'; its targets: none"):
        open_labelled(digits["train"], "age")
    train = open_labelled(digits["train"])
    only_zeros = train.only(np.flatnonzero(train.answers.numpy() == 0))
    with pytest.raises(InputError, match="label 1 doesn't occur"):
        check_pair(only_zeros, train)
