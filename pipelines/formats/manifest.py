"""The manifest of a converted set: its content, the source of each image, and each image's digest.

It is `OUT.beton.json` next to a beton, `manifest.json` in a folder of tars. Its "samples" are rows, one per
line, in file order, with the columns listed in "sample_columns". With more than 100,000 images the rows are
in a Parquet file instead, which "samples" then names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipelines.errors import InputError, first_line
from pipelines.files import sync

ROWS_IN_JSON = 100_000
JSON_ROWS, PARQUET_ROWS = 1_000, 50_000  # written at a time
COLUMNS = ("name", "label", "mode", "height", "width", "bytes", "stored", "turned", "sha256")
# Entries that are read: their kinds, and those of a list's elements.
KINDS: dict[str, tuple[Any, Any]] = {
    "several_frames": (int, None),
    "targets": (list, str),
    "refused": (list, dict),
}

Samples = dict[str, list[Any]]  # {column: one value per image}


def manifest_path(data: Path) -> Path:
    """The path of the manifest of a beton or of a folder of tars."""
    return data / "manifest.json" if data.is_dir() else data.with_name(data.name + ".json")


def rows_path(manifest: Path) -> Path:
    return manifest.with_name(manifest.name.removesuffix(".json") + ".samples.parquet")


def write_manifest(
    path: Path,
    manifest: dict[str, Any],
    samples: Callable[[int], Iterator[Samples]],
    aside: Callable[[Path], Path],
) -> dict[str, Any]:
    """Write the files of a manifest meant for `path`, each `aside` and synced, and return the manifest.

    `samples(n)` yields its rows, at most n images at a time, so that they are never all in memory.
    """
    first = next(samples(1))
    manifest = {**manifest, "sample_columns": list(first)}
    if manifest["count"] > ROWS_IN_JSON:
        rows = rows_path(path)
        with open(aside(rows), "wb") as file:
            _write_parquet(file, samples(PARQUET_ROWS))
            sync(file)
        text = json.dumps({**manifest, "samples": rows.name}, indent=1)
        with open(aside(path), "wb") as file:
            file.write(text.encode())
            sync(file)
        return manifest
    with open(aside(path), "wb") as file:
        text, between = json.dumps(manifest, indent=1, ensure_ascii=False), "\n"
        file.write(_utf8(f'{text[:-2]},\n "samples": ['))
        for some in samples(JSON_ROWS):
            for row in zip(*some.values()):
                file.write(_utf8(between + json.dumps(row, ensure_ascii=False)))
                between = ",\n"
        file.write(b"\n ]\n}\n")
        sync(file)
    return manifest


def _utf8(text: str) -> bytes:
    """JSON text as UTF-8; parts of a file name that aren't text become JSON escapes (such as \\udcff)."""
    return text.encode("utf-8", "backslashreplace")


def content_of(manifest: Path) -> dict[str, Any]:
    """A manifest, without its rows if it is laid out as `write_manifest` does; empty if the file doesn't
    exist or isn't a JSON object.

    Raises InputError if it can't be read, as names would be lost silently.
    """
    if not manifest.is_file():
        return {}
    try:
        text = manifest.read_bytes()
        head, _, rows = text.partition(b',\n "samples": [\n')  # a set of many files has millions of rows
        whole = rows.endswith(b"]\n ]\n}\n")
        content = json.loads((head + b"}" if whole else text).decode("utf-8", "surrogatepass"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{manifest}: not a manifest, or damaged ({reason})") from error
    return content if isinstance(content, dict) else {}


def read_manifest(path: Path) -> tuple[dict[str, Any], Samples]:
    """The manifest without its rows, and the rows by column. Raises InputError if it can't be read."""
    manifest, columns = _read(path, None)
    samples: Samples = {}
    for name in list(columns):
        column = columns.pop(name)  # so that only one column at a time is in memory twice
        samples[name] = column if isinstance(column, list) else column.to_pylist()
        if name == "sha256" and not isinstance(column, list):
            samples[name] = [digest.hex() for digest in samples[name]]
    return manifest, samples


def read_columns(path: Path, wanted: Collection[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest without its rows, and those of the wanted columns that it has, as arrays [N] of numbers or
    of str objects. Of rows in a Parquet file no other column is read. Raises like `read_manifest`."""
    manifest, columns = _read(path, wanted)
    return manifest, {
        name: np.array(column) if isinstance(column, list) else column.to_numpy()
        for name, column in columns.items()
    }


def require_kinds(path: Path, content: dict[str, Any]) -> None:
    """Raise InputError if an entry of a manifest isn't of its kind."""
    for name, (kind, of) in KINDS.items():
        value = content.get(name, kind())
        if not isinstance(value, kind) or (of and any(not isinstance(each, of) for each in value)):
            raise InputError(f"{path}: not a manifest of a conversion, or damaged (its {name})")


def require_columns(path: Path, columns: Collection[str], wanted: Collection[str]) -> None:
    """Raise InputError if a manifest lacks one of the wanted columns."""
    if lacking := [name for name in wanted if name not in columns]:
        raise InputError(f"{path}: not a manifest of a conversion, or damaged (no {lacking[0]})")


def _read(path: Path, wanted: Collection[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest without its rows, and columns (all, or the wanted ones) as lists, or as Arrow columns if
    they come from a Parquet file."""
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
        rows, columns = manifest.pop("samples"), manifest["sample_columns"]
        chosen = [name for name in columns if wanted is None or name in wanted]
        found: dict[str, Any]
        if isinstance(rows, str):
            import pyarrow.parquet as pq

            table = pq.read_table(path.with_name(rows), columns=chosen)
            found, count = {name: table[name] for name in chosen}, table.num_rows
        else:
            found, count = {name: [row[columns.index(name)] for row in rows] for name in chosen}, len(rows)
            if any(len(row) != len(columns) for row in rows):
                raise ValueError("a row of it has another number of values than there are columns")
        if count != manifest["count"]:
            raise ValueError("it has another number of rows than images")
    except OSError as error:
        raise InputError(f"{path}: the manifest cannot be read ({error.strerror or error})") from error
    except Exception as error:  # not JSON, not a manifest, or a damaged Parquet file
        raise InputError(
            f"{path}: not a manifest of a conversion, or damaged ({first_line(error)})"
        ) from error
    require_kinds(path, manifest)
    return manifest, found


def _write_parquet(file: IO[bytes], chunks: Iterator[Samples]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for samples in chunks:
        digests = [bytes.fromhex(digest) for digest in samples["sha256"]]
        names = [name.encode("utf-8", "backslashreplace").decode() for name in samples["name"]]
        columns = samples | {"name": names}  # Parquet's strings are text: other bytes of a name are escaped
        arrays = {name: pa.array(values) for name, values in columns.items() if name != "sha256"}
        table = pa.table({name: arrays.get(name, pa.array(digests, pa.binary(32))) for name in samples})
        if writer is None:
            writer = pq.ParquetWriter(file, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()


def min_median_max(counts: np.ndarray) -> dict[str, float]:
    """Smallest, median and largest of whole numbers, among which n occurs counts[n] times."""
    there, total = np.flatnonzero(counts), np.cumsum(counts)
    middle = np.searchsorted(total, [(total[-1] + 1) // 2, total[-1] // 2 + 1])
    return {"min": int(there[0]), "median": float(middle.mean()), "max": int(there[-1])}
