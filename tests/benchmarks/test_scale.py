"""The benchmark of ImageNet's size: what it makes can be read, and it sees the memory of children."""

import json
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
    seconds, mib = scale.measured("open", [sys.executable, "-c", child], tmp_path / "log", None)
    assert seconds > 0.5 and 80 < mib < 160


def test_a_command_that_fails_says_its_last_words(tmp_path):
    with pytest.raises(InputError, match="ended with status 3(.|\n)*no such thing"):
        words = "import sys; print('no such thing'); sys.exit(3)"
        scale.measured("open", [sys.executable, "-c", words], tmp_path / "log", None)


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


def test_rows_of_other_sizes_stay_in_the_table(tmp_path):
    path = tmp_path / "scale.json"
    for images, seconds in ((10, 1), (20, 2), (10, 3)):
        scale.keep(path, [{"row": "open", "images": images, "seconds": seconds}], [])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["images"], row["seconds"]) for row in rows] == [(20, 2), (10, 3)]
