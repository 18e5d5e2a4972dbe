"""Freeze the code of a queued job at its submission: a copy under OUT/code, named by its content."""

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("lvssl", "pipelines", "slurm")


def snapshot(out: Path) -> Path:
    """Copy the packages in their present state; returns the folder to put first in PYTHONPATH.

    The same code always gives the same folder.
    """
    files = source_files()
    content = hashlib.sha256()
    for name, file in sorted(files.items()):
        content.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    folder = out / "code" / content.hexdigest()[:12]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        for name, file in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, aside / name)
        aside.chmod(0o755)
        os.replace(aside, folder)
    return folder


def source_files() -> dict[str, Path]:
    """{name in the copy: path} of all files of our packages, wherever they are imported from."""
    files = {}
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(next(iter(spec.submodule_search_locations)))
        for file in root.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                files[str(Path(package) / file.relative_to(root))] = file
    return files
