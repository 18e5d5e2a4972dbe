"""Choose the reader that decodes on the CPU what lies at a path: a beton, or plain images."""

from pathlib import Path

from pipelines.datasets.parts import files_of, is_by_name
from pipelines.decode.reader import Reader
from pipelines.errors import InputError

TABLES_AND_TARS = (".tar", ".parquet", ".arrow", ".csv", ".tsv", ".jsonl")


def open_files(path: str | Path, kind: str = "auto") -> Reader:
    """`kind`: beton for .betons, folder for plain images, auto for either. Raises InputError."""
    if kind == "auto":
        kind = "folder" if _holds_images(Path(path)) else "beton"
    if kind == "folder":
        if Path(path).suffix.lower() == ".beton":
            raise InputError(f"{path}: a .beton can only be read by --source beton or auto")
        from pipelines.decode.images import ImageReader

        return ImageReader(path)
    from pipelines.decode.beton import BetonReader  # imported here: numba takes a second to load

    return BetonReader(path)


def _holds_images(path: Path) -> bool:
    """Whether the path holds plain images: a folder, tars, a table of them, or torchvision:NAME."""
    end = path.suffix.lower()
    if path.is_dir() or end == ".beton":
        return path.is_dir()
    if end == ".txt":
        return any(file.suffix.lower() != ".beton" for file in files_of(path))
    return end in TABLES_AND_TARS or is_by_name(path)
