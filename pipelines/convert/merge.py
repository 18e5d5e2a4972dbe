"""Merge the parts of an array job."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.convert.conversion import OutputOptions, Work, check_targets, make_outputs, run
from pipelines.convert.store import Settings, Stored
from pipelines.datasets.beton import reader_of
from pipelines.datasets.dataset import Dataset
from pipelines.datasets.parts import require_whole
from pipelines.errors import InputError
from pipelines.formats.beton import BetonFile, named_targets, open_beton
from pipelines.formats.manifest import Samples, manifest_path, read_manifest, rows_path


def merge(
    out: str | Path,
    options: OutputOptions = OutputOptions(),  # noqa: B008 (frozen)
    remove_parts: bool = False,
) -> dict[str, Any]:
    """Merge the parts of `out` (made by convert with `shard`) into the bytes that one conversion of all
    gives.

    Every image's digest is checked on the way; nothing is decoded. Returns the manifest as `convert` does,
    with "parts": the part files that are left. `remove_parts` removes them and their manifests at the end.
    Raises InputError if a part is missing, damaged, or from a different conversion than the first.
    """
    options.validate()
    out = Path(out)
    check_targets(out, options.tars, options.overwrite)
    parts = _read_parts(part_files(out))
    source, first = parts.source(), parts.manifests[0]
    refused = [each for manifest in parts.manifests for each in manifest["refused"]]
    outputs = make_outputs(out, options, source, len(source.labels) + len(refused))
    known = {key: first[key] for key in ("source_count", "settings", "versions")}
    known["several_frames"] = sum(manifest.get("several_frames", 0) for manifest in parts.manifests)
    head = {key: first[key] for key in ("source", "split")}
    settings = Settings(**first["settings"])  # parts made by older versions lack newer settings
    order = np.arange(len(source.labels))
    manifest = run(Work(source, order, settings, outputs, options, head, known, refused))
    if remove_parts:
        parts.remove()
    return {**manifest, "parts": [] if remove_parts else [str(path) for path in parts.paths]}


@dataclass(frozen=True)
class _Parts:
    """The parts of one conversion, in order."""

    paths: list[Path]
    betons: list[BetonFile]
    manifests: list[dict[str, Any]]
    rows: list[Samples]

    def source(self) -> Dataset:
        """The stored images of all parts, each checked against its digest."""
        bytes_of = reader_of(self.betons)
        place = [(part, index) for part, beton in enumerate(self.betons) for index in range(beton.count)]
        first = self.manifests[0]
        targets = [named_targets(beton, first["targets"]) for beton in self.betons]
        return Dataset(
            names=[name for samples in self.rows for name in samples["name"]],
            labels=np.concatenate([beton.labels for beton in self.betons]),
            classes=first["classes"],
            read=lambda at: self._stored(*place[at], bytes_of(*place[at])),
            split=first["split"],
            targets={
                name: np.concatenate([of_part[name] for of_part in targets]) for name in first["targets"]
            },
        )

    def _stored(self, part: int, index: int, data: bytes) -> Any:
        samples = self.rows[part]
        if hashlib.sha256(data).hexdigest() != samples["sha256"][index]:
            raise InputError(
                f"{self.paths[part]}: image {index} ({samples['name'][index]}) isn't what was written; "
                "convert this part again"
            )
        size = int(samples["height"][index]), int(samples["width"][index])
        exif_rotated = bool(samples["turned"][index])
        return Stored(int(samples["mode"][index]), *size, data, samples["stored"][index], exif_rotated)

    def remove(self) -> None:
        for path in self.paths:
            beside = manifest_path(path)
            for each in (path, beside, rows_path(beside)):
                each.unlink(missing_ok=True)


def _read_parts(paths: list[Path]) -> _Parts:
    """Raise InputError if a part is damaged, or from a different conversion than the first."""
    betons = [open_beton(path) for path in paths]
    read = [read_manifest(manifest_path(path)) for path in paths]
    parts = _Parts(paths, betons, [each[0] for each in read], [each[1] for each in read])
    for path, manifest in zip(paths, parts.manifests):
        same = ("source", "split", "settings", "versions", "classes", "targets", "source_count")
        if lacking := [key for key in (*same, "refused") if key not in manifest]:
            raise InputError(f"{manifest_path(path)}: not a conversion's, or damaged (no {lacking[0]})")
        for key in same:
            if manifest[key] != parts.manifests[0][key]:
                first = parts.manifests[0][key]
                raise InputError(
                    f"{path}: its {key}{differing(manifest[key], first)} differs from that of "
                    f"{paths[0].name}; convert it again in the same way, with --overwrite"
                )
    return parts


def differing(one: Any, other: Any) -> str:
    """The first key under which two tables hold different values: " (jpeg_quality: 90, there 95)"."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return ""
    name = next(n for n in (*one, *other) if (n in one, one.get(n)) != (n in other, other.get(n)))
    values = (repr(table[name]) if name in table else "not given" for table in (one, other))
    return f" ({name}: {', there '.join(values)})"


def part_files(out: Path) -> list[Path]:
    """train.part-001-of-008.beton ... in order. Raises InputError if there are none, or if one is missing."""
    pattern = re.compile(rf"{re.escape(out.stem)}\.part-(\d+)-of-\d+{re.escape(out.suffix)}")
    folder = out.parent
    found = {p: m for p in (folder.iterdir() if folder.is_dir() else ()) if (m := pattern.fullmatch(p.name))}
    if not found:
        raise InputError(f"{out}: no parts next to it (such as {out.stem}.part-001-of-008{out.suffix})")
    require_whole(str(out), [*found])
    return sorted(found, key=lambda path: int(found[path][1]))
