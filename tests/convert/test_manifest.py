"""Columns of a manifest: of many images those alone that are asked for."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_images import photos

from pipelines.convert.conversion import ConvertOptions, convert
from pipelines.datasets.shards import open_shards
from pipelines.errors import InputError
from pipelines.formats import manifest
from pipelines.formats.manifest import COLUMNS, read_columns, read_manifest, write_manifest

ROWS = {
    "name": [f"{i}.jpg" for i in range(5)],
    "label": [3, 1, 0, 2, 1],
    "age": [1.5, 2.5, 0.0, -1.0, 7.0],
    "sha256": ["00" * 32, "11" * 32, "22" * 32, "33" * 32, "44" * 32],
}


@pytest.fixture(params=["rows in JSON", "rows in Parquet"])
def written(request, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_IN_JSON", 10 if request.param == "rows in JSON" else 3)
    path = tmp_path / "manifest.json"
    head = {"count": 5, "targets": ["age"]}
    write_manifest(path, head, lambda n: iter([{k: v[:n] for k, v in ROWS.items()}]), lambda path: path)
    return path


def test_columns_are_those_of_the_whole_manifest(written):
    head, columns = read_columns(written, ("label", "age", "name", "nothing"))
    assert (head, columns.keys()) == (read_manifest(written)[0], {"name", "label", "age"})
    assert read_manifest(written)[1] == ROWS
    assert {name: column.tolist() for name, column in columns.items()} == {
        name: ROWS[name] for name in columns
    }


def test_labels_are_read_without_the_other_columns(tmp_path, monkeypatch):
    """Of ImageNet the other columns are a gigabyte of Python objects."""
    monkeypatch.setattr(manifest, "ROWS_IN_JSON", 3)
    asked, read_table, options = [], pq.read_table, ConvertOptions(webdataset=tmp_path / "tars")
    convert(str(photos(tmp_path / "set", classes=2, each=3)), None, options=options)
    monkeypatch.setattr(
        pq, "read_table", lambda file, columns: asked.extend(columns) or read_table(file, columns=columns)
    )
    opened = open_shards(tmp_path / "tars")
    assert opened.labels.tolist() == [0, 0, 0, 1, 1, 1] and opened.labels.dtype == np.int64
    assert asked == ["label"] and set(asked) < set(COLUMNS)


def test_a_manifest_of_another_count_is_damaged(written):
    written.write_text(json.dumps(json.loads(written.read_text()) | {"count": 6}))
    for read in (read_manifest, lambda path: read_columns(path, ("label",))):
        with pytest.raises(InputError, match="another number of rows"):
            read(written)
