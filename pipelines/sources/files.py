"""The source that decodes here what lies at a path: a beton, or images as they are."""

from pathlib import Path

from pipelines.errors import InputError
from pipelines.sources.source import Source


def open_files(path: str | Path, kind: str = "auto") -> Source:
    """`kind`: ffcv for a .beton, folder for images as they are, auto for either. Raises InputError."""
    if kind == "auto":
        kind = "folder" if _holds_images(Path(path)) else "ffcv"
    if kind == "folder":
        if Path(path).suffix == ".beton":
            raise InputError(f"{path}: a .beton is what --source ffcv reads, or auto")
        from pipelines.sources.folder import FolderSource

        return FolderSource(path)
    from pipelines.sources.ffcv import FFCVSource  # here: numba takes a second to load

    return FFCVSource(path)


def _holds_images(path: Path) -> bool:
    """Whether these are images as they are: a folder, tars, a table of them, or torchvision:NAME."""
    if path.is_dir() or path.suffix == ".beton":
        return path.is_dir()
    return path.suffix in (".tar", ".parquet", ".csv", ".jsonl") or bool({"{", ":"} & {*str(path)})
