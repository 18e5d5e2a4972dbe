"""The benchmark of ImageNet's size: what it makes can be read, and it sees the memory of children."""

import argparse
import json
import signal
import sys

import numpy as np
import pytest

from benchmarks import scale
from lvssl.runs.embeddings import open_pair_of_embeddings
from pipelines.decode import open_reader
from pipelines.errors import InputError

ALLOCATES = "import time; held = bytearray(b'x') * (80 << 20); time.sleep(0.5)"


def test_memory_is_that_of_a_process_and_its_children(tmp_path):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATES!r}], check=True)"
    taken = scale.measured("open", [sys.executable, "-c", child], tmp_path / "log")
    assert taken["seconds"] > 0.5 and 80 < taken["mib"] < 160 and taken["processor_seconds"] > 0


def test_a_command_that_fails_says_its_last_words(tmp_path):
    with pytest.raises(InputError, match="ended with status 3(.|\n)*no such thing"):
        words = "import sys; print('no such thing'); sys.exit(3)"
        scale.measured("open", [sys.executable, "-c", words], tmp_path / "log")


def test_a_command_is_ended_after_its_minutes_and_by_a_signal_when_it_is_due(tmp_path):
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(InputError, match="ended after 0.01 minutes"):
        scale.measured("open", waits, tmp_path / "log", minutes=0.01)
    taken = scale.measured("open", waits, tmp_path / "log", lambda: True, signal.SIGKILL)
    assert taken["signal"] == "SIGKILL"


def test_rows_that_are_there_are_not_run_again_and_a_failed_one_is(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "make_images", lambda *_: None)
    marks = "from pathlib import Path; p = Path({mark!r}); p.write_text(p.read_text() + 'x'); 1 / {divisor}"
    mark = tmp_path / "mark"
    mark.write_text("")
    options = argparse.Namespace(images=10, only=[], json=None, minutes=1)

    def rows(divisor):
        words = marks.format(mark=str(mark), divisor=divisor)
        commands = {"open": [sys.executable, "-c", words]}
        return scale.measured_rows(tmp_path, commands, options)

    (failed,) = rows(0)
    assert not failed["within"] and "ZeroDivisionError" in failed["failed"]
    (done,), (again,) = rows(1), rows(1)
    assert done["within"] and again == done and mark.read_text() == "xx"


def test_made_images_and_embeddings_are_of_all_classes_and_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "CLASSES", 20)
    monkeypatch.setattr(scale, "IN_A_FILE", 30)
    monkeypatch.setattr(scale, "CHUNK", 16)
    scale.make_images(tmp_path / "images", 70)
    reader = open_reader(tmp_path / "images" / "train")
    assert len(reader) == 70 and set(reader.labels) == set(range(20))
    assert len({reader.encoded(0, i) for i in range(70)}) == 70
    scale.make_embeddings(tmp_path / "embeddings", 70)
    train, test = open_pair_of_embeddings(tmp_path / "embeddings", None, None)
    assert train.features.shape == (70, scale.WIDTH) and len(test.labels) == scale.QUERIES
    assert np.unique(train.labels).tolist() == list(range(20))


def test_a_folder_with_another_number_of_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "CLASSES", 20)
    scale.make_images(tmp_path, 40)
    scale.make_images(tmp_path, 40)
    with pytest.raises(InputError, match="holds 40 images, not 60"):
        scale.make_images(tmp_path, 60)


def test_after_a_merge_that_fails_the_other_rows_still_run(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "make_images", lambda *_: None)
    options = argparse.Namespace(images=10, only=[], json=None, minutes=1)
    commands = {"merge": [sys.executable, "-c", "1 / 0"], "verify": [sys.executable, "-c", ""]}
    merge, verify = scale.measured_rows(tmp_path, commands, options)
    assert "ZeroDivisionError" in merge["failed"] and verify["within"]


def test_a_merge_of_other_bytes_fails(tmp_path, monkeypatch):
    row = {"row": "merge", "within": True, "same bytes as convert": False}
    monkeypatch.setattr(scale, "measured_rows", lambda *_: [row])
    with pytest.raises(MemoryError, match="of other bytes: merge"):
        scale.main(["--images", "1000", "--scratch", str(tmp_path)])
    with pytest.raises(InputError, match="--page needs --json"):
        scale.main(["--page", str(tmp_path / "page.md")])


def test_rows_of_other_sizes_stay_in_the_table(tmp_path):
    path = tmp_path / "scale.json"
    for images, seconds in ((10, 1), (20, 2), (10, 3)):
        scale.keep(path, [{"row": "open", "images": images, "seconds": seconds}])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["images"], row["seconds"]) for row in rows] == [(20, 2), (10, 3)]


def test_the_table_goes_into_the_place_of_the_old_one(tmp_path):
    page = tmp_path / "scale.md"
    page.write_text("before\n\n| row | old |\n| --- | --- |\n| x | 1 |\n\nafter\n\nend\n")
    taken = {"seconds": 1234.5, "processor_seconds": 2.0, "mib": 1500}
    rows = [{"row": "merge", "images": 10} | taken, {"row": "open", "images": 10, "failed": "why\nnot"}]
    scale.into_page(page, [*rows, {"row": "kNN by lvssl", "images": 10, "seconds": 1}])
    before, head, line, merge, opened, *rest = page.read_text().replace("\n\n", "\n").splitlines()
    assert before == "before" and rest == ["after", "end"] and "MiB, 10" in head and "--:" in line
    assert (merge, opened) == ("| merge | 1,234.5 | 2.0 | 1,500 |", "| open | why |  |  |")
