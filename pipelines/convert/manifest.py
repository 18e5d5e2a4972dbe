"""The manifest beside a converted set: what is in it, where each image came from, and its digest.

`OUT.beton.json` beside a beton, `manifest.json` in a folder of tars. Its "samples" are rows, one line each,
in the order of the file, with the columns that "sample_columns" names. With more than 100,000 images the
rows are a Parquet file instead, which "samples" then names.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import InputError

ROWS_IN_JSON = 100_000
COLUMNS = ("name", "label", "mode", "height", "width", "bytes", "stored", "turned", "sha256")

Samples = dict[str, list[Any]]  # by column, as long as there are images


def manifest_path(data: Path) -> Path:
    """Where the manifest of a beton or of a folder of tars lies."""
    return data / "manifest.json" if data.is_dir() else data.with_name(data.name + ".json")


def rows_path(manifest: Path) -> Path:
    return manifest.with_name(manifest.name.removesuffix(".json") + ".samples.parquet")


def manifest_files(path: Path, manifest: dict[str, Any], samples: Samples) -> dict[Path, bytes]:
    """The files of a manifest that shall lie at `path`, by their paths, the manifest itself last."""
    columns = list(samples)
    manifest = {**manifest, "sample_columns": columns}
    if manifest["count"] > ROWS_IN_JSON:
        rows = rows_path(path)
        text = json.dumps({**manifest, "samples": rows.name}, indent=1)
        return {rows: _parquet(samples), path: text.encode()}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in zip(*samples.values()))
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    return {path: f'{text[:-2]},\n "samples": [\n{lines}\n ]\n}}\n'.encode("utf-8", "surrogatepass")}


def read_manifest(path: Path) -> tuple[dict[str, Any], Samples]:
    """The manifest without its rows, and the rows by column. Raises InputError if it can't be read."""
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
        rows, columns = manifest.pop("samples"), manifest["sample_columns"]
        if isinstance(rows, str):
            import pyarrow.parquet as pq

            table = pq.read_table(path.with_name(rows))
            samples: Samples = {name: table[name].to_pylist() for name in columns}
            samples["sha256"] = [digest.hex() for digest in samples["sha256"]]
        else:
            samples = dict(zip(columns, map(list, zip(*rows)))) if rows else {name: [] for name in columns}
        if any(len(column) != manifest["count"] for column in samples.values()):
            raise ValueError("it has another number of rows than images")
        return manifest, samples
    except OSError as error:
        raise InputError(f"{path}: the manifest cannot be read ({error.strerror or error})") from error
    except Exception as error:  # not JSON, not ours, or a damaged Parquet file
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a manifest of a conversion, or damaged ({what})") from error


def _parquet(samples: Samples) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {
        name: pa.array([bytes.fromhex(digest) for digest in values], pa.binary(32))
        if name == "sha256"
        else pa.array(values)
        for name, values in samples.items()
    }
    out = io.BytesIO()
    pq.write_table(pa.table(arrays), out, compression="zstd")
    return out.getvalue()


def spread(values: np.ndarray) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
