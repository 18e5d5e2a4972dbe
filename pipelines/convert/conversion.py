"""Dataset -> beton, WebDataset tars or both, and their manifests: each image is decoded once and checked.

A conversion can be killed at any moment. Its output is kept aside until it is complete (`.OUT.part`), and a
journal records how much of it is safely stored (`.OUT.journal`). The same command resumes from there, and
gives the same bytes as a conversion that was never interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipelines.convert.estimate import check_space, measure
from pipelines.convert.journal import Journal, open_alone
from pipelines.convert.outputs import BetonOutput, Item, Output, TarOutput, is_of_tars
from pipelines.convert.store import STORAGE_KINDS, Settings, Stored, select, store_batch
from pipelines.cores import cores
from pipelines.datasets.columns import Columns
from pipelines.datasets.dataset import Dataset, class_counts, evenly_spaced, of_classes
from pipelines.datasets.opening import open_dataset
from pipelines.errors import InputError
from pipelines.files import sync_folder, why_unwritten
from pipelines.formats import jpeg
from pipelines.formats.beton import LONGEST_SIDE
from pipelines.formats.manifest import Samples, min_median_max, read_manifest, rows_path, write_manifest
from pipelines.formats.webdataset import IMAGES_PER_TAR
from pipelines.in_order import in_order

CHUNK = 16  # images per task: a future costs some 40 us
COMMIT_SECONDS = 1.0  # the most work that a kill loses; a commit takes up to a second of the disk's time
COMMIT_BYTES = 8 << 20  # commit earlier if the disk is idle, so that less is left to write at the end
KEEP_SECONDS = 5.0  # keep a longer conversion's work if it ends early; less is made again sooner
REPLAYED = 10_000  # records of the journal held in memory at a time
CHECKED = 1_000  # images whose digests are compared before a file is published
RESERVE = 32 << 20  # bytes of free disk space below which a conversion stops


AS_IT_IS = Settings()


class Bar(tqdm):
    """A bar with a lock of this process alone. tqdm's own lock starts a process, and a fork that is killed
    while it holds the lock blocks all the others."""

    _lock = threading.RLock()
    disable = True  # until it is made: closing it must not fail if a signal prevented that


class NothingStored(InputError):
    """No image of a source can be stored, so there is nothing to keep or to resume."""


@dataclass(frozen=True)
class Work:
    """A conversion that is ready to start."""

    source: Dataset
    order: np.ndarray  # int64 [n], positions in the source
    settings: Settings
    outputs: list[Output]
    options: OutputOptions
    head: dict[str, Any]  # first entries of the manifest
    known: dict[str, Any] = field(default_factory=dict)  # manifest entries that replace those found here
    refused_before: list[dict[str, str]] = field(default_factory=list)  # by the conversions of the parts

    @property
    def workers(self) -> int:
        return self.options.workers or cores()


@dataclass(frozen=True)
class OutputOptions:
    """What is written besides a beton, and how. None of it changes the images."""

    webdataset: str | Path | None = None  # a new folder for tars
    images_per_tar: int = IMAGES_PER_TAR
    workers: int | None = None  # threads; None: one per core
    overwrite: bool = False  # replace existing outputs
    restart: bool = False  # discard what an interrupted conversion has left
    progress: bool = False  # show notes, estimate and a bar on stderr

    def validate(self) -> None:
        """Raise InputError for a number below 1, or a folder without a name of its own."""
        if self.tars is not None and self.tars.name in ("", ".."):
            raise InputError(f"--webdataset {self.webdataset}: name a new folder")
        for option, number in (("--workers", self.workers), ("--images-per-tar", self.images_per_tar)):
            if number is not None and number < 1:
                raise InputError(f"{option} {number}: must be at least 1")

    @property
    def tars(self) -> Path | None:
        return None if self.webdataset is None else Path(self.webdataset)


@dataclass(frozen=True)
class ConvertOptions(OutputOptions):
    """Options of the outputs, and which part of a source is read, and how."""

    split: str | None = None
    root: str | Path = "data"  # torchvision's download folder
    classes: str | Path | None = None  # the classes' order: a manifest, or a text file with one name per line
    devkit: str | Path | None = None  # ImageNet's devkit, for the validation tar
    shard: tuple[int, int] | None = None  # (K, N): the K-th of N parts, to a beton of its own, for `merge`
    dry_run: bool = False  # stop after notes and estimate

    def validate(self) -> None:
        """Raise InputError for a number below 1, and for tars of a part."""
        super().validate()
        if self.shard is not None and self.webdataset is not None:
            raise InputError("--shard: a part is written as a beton; ask for the tars when you --merge")


def convert(
    source: str,
    out: str | Path | None,
    settings: Settings = AS_IT_IS,
    options: ConvertOptions = ConvertOptions(),
) -> dict[str, Any]:
    """Write the beton `out`, tars, or both, and return the manifest (of the first).

    Outputs appear complete or not at all. Their bytes don't depend on the number of workers, nor on how often
    the conversion was killed and repeated.

    The returned manifest, unlike the file, also has "seconds", "notes", "estimate" and "resumed"; the
    samples' rows are only in the file. With `dry_run` nothing is written, and only the entries that are known
    before the conversion are returned. Raises InputError for every error that the user can fix.
    """
    settings.check()
    options.validate()
    shard, beton = options.shard, part_path(out, options.shard)
    if beton is None and options.tars is None:
        raise InputError("no output: name OUT.beton, --webdataset DIR, or both")
    check_targets(beton, options.tars, options.overwrite)
    columns = Columns(settings.image_column, settings.label_column, tuple(settings.targets))
    opened = open_dataset(
        source, options.split, options.root, classes=options.classes, devkit=options.devkit, columns=columns
    )
    rows = of_classes(opened, settings.only_classes)
    order = rows[select(opened.labels[rows], settings.subset, settings.shuffle_seed)]
    head: dict[str, Any] = {"source": source, "split": opened.split}
    if shard is not None:
        number, of = shard
        if not 1 <= number <= of <= len(order):
            raise InputError(
                f"--shard {number}/{of}: K must be within 1 and N, N at most {len(order)} images"
            )
        head["shard"] = [number, of]
        order = order[len(order) * (number - 1) // of : len(order) * number // of]
    outputs = make_outputs(beton, options, opened, len(order))
    work = Work(opened, order, settings, outputs, options, head)
    return run(work, dry_run=options.dry_run)


def part_path(out: str | Path | None, shard: tuple[int, int] | None) -> Path | None:
    """train.beton, or, for the third of eight parts, train.part-003-of-008.beton."""
    if out is None or shard is None:
        return None if out is None else Path(out)
    out = Path(out)
    return out.with_name(f"{out.stem}.part-{shard[0]:03d}-of-{shard[1]:03d}{out.suffix}")


def make_outputs(beton: Path | None, options: OutputOptions, source: Dataset, capacity: int) -> list[Output]:
    outputs: list[Output] = []
    if beton is not None:
        outputs.append(BetonOutput(beton, capacity, list(source.targets)))
    if options.tars is not None:
        outputs.append(TarOutput(options.tars, source.split or "images", options.images_per_tar))
    return outputs


def run(work: Work, dry_run: bool = False) -> dict[str, Any]:
    """Run a conversion, from its start or from where it was interrupted."""
    started = time.perf_counter()
    restart, overwrite, progress = work.options.restart, work.options.overwrite, work.options.progress
    beton = next((output.final for output in work.outputs if not output.as_png), None)
    tars = next((output.final for output in work.outputs if output.as_png), None)
    path = journal_path(work.outputs[0].final)
    if restart and not dry_run and path.exists():
        with open_alone(path):
            _remove(path, work.outputs)
    check_targets(beton, tars, overwrite, journaled=not restart)
    for note in work.source.notes if progress else ():
        Bar.write(f"note: {note}", file=sys.stderr)
    estimate = None
    if restart or not path.exists():
        estimate = measure(work.source, work.order, work.settings, work.workers, as_png=_as_png(work))
        if progress and estimate is not None:
            Bar.write(f"estimate: {estimate}", file=sys.stderr)
        check_space(beton, tars, estimate)
    extra = {"notes": work.source.notes, "estimate": asdict(estimate) if estimate else None}
    if dry_run:
        return {**work.head, **extra, "count": len(work.order)}

    manifest = None
    with _journal(work, path) as journal:
        resumed = journal.count
        if not journal.complete:
            check_targets(beton, tars, overwrite, journaled=False)
            _convert_images(work, journal)
            manifest = _finish(work, journal)
        _publish(work)
    if manifest is None:  # it was killed when only the renaming was left
        manifest = read_manifest(work.outputs[0].manifest)[0]
    return {**manifest, "seconds": time.perf_counter() - started, "resumed": resumed, **extra}


@contextmanager
def _journal(work: Work, path: Path) -> Iterator[Journal]:
    """Open the journal of a conversion, and remove it when all is done.

    A conversion that ends early keeps its work if it took a while or was resumed; otherwise it leaves nothing
    behind. A disk error then becomes an InputError, and Ctrl-C says how much is kept.
    """
    fresh, made, journal = not path.exists(), list[Path](), None
    started = time.perf_counter()  # only now, since the time for an estimate isn't work to be kept
    try:
        made = [folder for output in work.outputs for folder in _make_folders(output.final.parent)]
        fingerprint = _fingerprint(work)
        with _uninterrupted():  # otherwise the file could exist without this process knowing that it made it
            journal = Journal(path, fingerprint)
        yield journal
    except BaseException as error:
        slow = time.perf_counter() - started > KEEP_SECONDS
        keep = not isinstance(error, NothingStored) and (not fresh or slow)
        if journal is not None and not keep:  # under this lock: another process's files stay
            _remove(path, work.outputs)
        for each in (journal, *work.outputs):
            if each is not None:
                each.close()
        if not keep:
            _remove_folders(made)
        done = 0 if journal is None else journal.committed
        kept = f"{done:,} of {len(work.order):,} images are kept" if keep and done else ""
        if isinstance(error, OSError):
            raise InputError(why_unwritten(_unwritten(work, error), error, kept)) from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from error
        raise
    path.unlink(missing_ok=True)
    journal.close()


def _unwritten(work: Work, error: OSError) -> Path:
    """The output to which an error belongs; the first if it doesn't say."""
    name = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else Path()
    concerned = (output.final for output in work.outputs if output.part in (name, *name.parents))
    return next(concerned, work.outputs[0].final)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the block ends. (Only the main thread ever receives them.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler is not None}  # not Python's
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


# ------------------------------------------------------------------- the images


def _convert_images(work: Work, journal: Journal) -> None:
    """Convert the images that the journal doesn't have yet."""
    _replay(work, journal)
    with _Progress(work, journal) as progress, closing(_images(work, work.order[journal.count :])) as images:
        for index, stored in images:
            if isinstance(stored, str):
                _skip(work, journal, index, stored)
                progress.skipped += 1
            else:
                item = _item(work.source, index)
                for output in work.outputs:
                    output.add(item, stored)
                journal.append(_record(stored))
                progress.written += len(stored.data)
            progress.step()
    if progress.skipped == len(work.order):
        journal.commit([], wait=True)
        first = f"{work.source.names[int(work.order[0])]}: {journal.reasons[0]}"
        raise NothingStored(
            f"none of the {progress.skipped} files is an image that can be stored; the first, {first}"
        )


def _replay(work: Work, journal: Journal) -> None:
    """Bring the outputs to the state that the journal records."""
    for output in work.outputs:
        output.prepare()
    for record, index in zip(chain.from_iterable(journal.records(REPLAYED)), work.order):
        if record["storage_kind"]:
            for output in work.outputs:
                output.replay(_item(work.source, int(index)), record)
    for output in work.outputs:
        output.cut()


def _skip(work: Work, journal: Journal, index: int, reason: str) -> None:
    """Record an image that can't be stored. Raises InputError if such an image is to end the conversion."""
    if work.settings.on_error == "raise":
        journal.commit(_synced(work), wait=True)
        name = work.source.names[index]
        raise InputError(f"{name}: {reason}; fix the file, or skip it with --on-error skip")
    journal.append((0, 0, 0, 0, 0, 0, 0, _NO_DIGEST, 0, _NO_DIGEST), reason)


class _Progress:
    """The bar, and when to commit. Attributes: skipped (images), written (bytes of images since it began)."""

    def __init__(self, work: Work, journal: Journal) -> None:
        self.work, self.journal = work, journal
        self.skipped, self.written, self.synced = len(journal.reasons), 0, 0
        self.committed = self.shown = time.perf_counter()
        total, done, hidden = len(work.order), journal.count, None if work.options.progress else True
        self.bar = Bar(total=total, initial=done, unit="img", smoothing=0.1, disable=hidden)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self) -> None:
        """Count one more image."""
        self.bar.update()
        now = time.perf_counter()
        if now - self.shown > 0.5:
            rate = self.written / 1e6 / max(self.bar.format_dict["elapsed"], 1e-3)
            self.bar.set_postfix_str(f"{rate:,.0f} MB/s" + f", {self.skipped} skipped" * bool(self.skipped))
            self.shown = now
        due = now - self.committed > COMMIT_SECONDS
        if due or (self.written - self.synced > COMMIT_BYTES and self.journal.idle()):
            self.journal.commit(_synced(self.work))
            _check_still_space(self.work.outputs)
            self.committed, self.synced = now, self.written


_NO_DIGEST = np.zeros(32, np.uint8)


def _record(stored: Stored) -> tuple:
    return (
        STORAGE_KINDS.index(stored.storage_kind), stored.exif_rotated, stored.several_frames,
        stored.mode, stored.height, stored.width, len(stored.data), np.frombuffer(stored.digest, np.uint8),
        len(stored.file), np.frombuffer(stored.file_digest, np.uint8),
    )  # fmt: skip


def _item(source: Dataset, index: int) -> Item:
    return Item(
        int(source.labels[index]), {name: float(column[index]) for name, column in source.targets.items()}
    )


def _synced(work: Work) -> list[int]:
    """Descriptors of the files written since the last commit, for the journal to sync and close."""
    return [number for output in work.outputs for number in output.flushed()]


def _as_png(work: Work) -> bool:
    return any(output.as_png for output in work.outputs)


def _images(work: Work, order: np.ndarray) -> Generator[tuple[int, Stored | str], None, None]:
    """Yield (position in the source, image, or the reason why it can't be stored), in the order given.

    Threads suffice: file reading, JPEG, PNG, digest and resize all release the GIL, and no image is copied
    between processes. The number of chunks in progress is limited, so that memory doesn't grow with the data.
    """

    as_png = _as_png(work)

    def attempts(chunk: np.ndarray) -> list[tuple[int, Stored | str]]:
        indices = [int(index) for index in chunk]
        return list(zip(indices, store_batch(work.source, indices, work.settings, as_png)))

    pool = ThreadPoolExecutor(work.workers, thread_name_prefix="convert")
    chunks = (order[start : start + CHUNK] for start in range(0, len(order), CHUNK))
    try:
        yield from chain.from_iterable(
            in_order(lambda chunk: pool.submit(attempts, chunk).result, chunks, 2 * work.workers)
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_still_space(outputs: list[Output]) -> None:
    for output in outputs:
        if shutil.disk_usage(output.part.parent).free < RESERVE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(output.part))


# ---------------------------------------------------------------------- the end


def _finish(work: Work, journal: Journal) -> dict[str, Any]:
    """Complete outputs and manifests, still aside, and return the first manifest; only the renaming can fail
    after this. The manifests are written while the disk takes the rest of the images."""
    for output in work.outputs:
        output.finish()
    journal.commit(_synced(work))
    manifests = []
    for output in work.outputs:
        manifest = {**work.head, **_figures(work, journal, output), **work.known}
        samples = partial(_samples, work, journal, output)
        manifests.append(write_manifest(output.manifest, manifest, samples, output.aside))
    _check_written(work, journal)
    journal.commit([], wait=True, complete=True)
    return manifests[0]


def _check_written(work: Work, journal: Journal) -> None:
    """Compare the files on disk with the journal: all sizes and tables, and the digests of up to CHECKED
    images, evenly spaced (`verify` reads all). Raises InputError: another process has written there."""
    count = len(work.order) - len(journal.reasons)
    chosen = evenly_spaced(count, CHECKED)
    for output in work.outputs:
        what, place = output.changed(), 0
        for records, _ in _kept(work, journal, REPLAYED):
            digests = records["file_digest" if output.as_png else "digest"]
            rows = chosen[(chosen >= place) & (chosen < place + len(records))] - place
            for row in [] if what else rows.tolist():
                if hashlib.sha256(output.stored(place + row)).digest() != digests[row].tobytes():
                    what = f"image {place + row} isn't what was written"
            place += len(records)
        if what:
            raise InputError(
                f"{output.part}: {what}: another process has changed it; wait until that one has "
                "finished, then run this command again with --restart"
            )


def _publish(work: Work) -> None:
    """Rename everything into place, manifests last; can be repeated if it was interrupted."""
    for output in work.outputs:
        output.publish()
    for output in work.outputs:
        for path in (rows_path(output.manifest), output.manifest):
            if output.aside(path).exists():
                os.replace(output.aside(path), path)
        sync_folder(output.final.parent)


def _kept(work: Work, journal: Journal, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Records of the images that were stored, and their positions in the source, `size` at a time."""
    start = 0
    for records in journal.records(size):
        indices = work.order[start : start + len(records)]
        start += len(records)
        kept = np.flatnonzero(records["storage_kind"])
        if len(kept):
            yield records[kept], indices[kept]


def _samples(work: Work, journal: Journal, output: Output, size: int) -> Iterator[Samples]:
    """Rows of the manifest, for `size` images at a time."""
    for rows, indices in _kept(work, journal, size):
        digests = rows["file_digest" if output.as_png else "digest"]
        samples: Samples = {
            "name": [work.source.names[index] for index in indices],
            "label": work.source.labels[indices].tolist(),
            "mode": rows["mode"].tolist(),
            "height": rows["height"].tolist(),
            "width": rows["width"].tolist(),
            "bytes": rows["file_size" if output.as_png else "size"].tolist(),
            "stored": [STORAGE_KINDS[kind] for kind in rows["storage_kind"]],
            "turned": rows["exif_rotated"].tolist(),
            "sha256": [digest.tobytes().hex() for digest in digests],
        }
        yield samples | {name: column[indices].tolist() for name, column in work.source.targets.items()}


def _figures(work: Work, journal: Journal, output: Output) -> dict[str, Any]:
    names, classes = work.source.names, len(work.source.classes)
    of_class, of_kind = np.zeros(classes, np.int64), np.zeros(len(STORAGE_KINDS), np.int64)
    rotated = several = 0
    of_height, of_width = np.zeros((2, LONGEST_SIDE + 1), np.int64)
    for rows, indices in _kept(work, journal, REPLAYED):
        of_class += class_counts(work.source.labels[indices], classes)
        of_kind += np.bincount(rows["storage_kind"], minlength=len(STORAGE_KINDS))
        of_height += np.bincount(rows["height"], minlength=len(of_height))
        of_width += np.bincount(rows["width"], minlength=len(of_width))
        rotated += int(rows["exif_rotated"].sum())
        several += int(rows["several_frames"].sum())
    stored = {kind: int(of_kind[number]) for number, kind in enumerate(STORAGE_KINDS) if number}
    return {
        **output.describe(),
        "count": int(of_kind.sum()),
        "bytes": output.bytes_written(),
        "classes": work.source.classes,
        "class_counts": of_class.tolist(),
        "targets": list(work.source.targets),
        "heights": min_median_max(of_height),
        "widths": min_median_max(of_width),
        "stored": {**stored, "turned_upright": rotated},
        "several_frames": several,
        "source_count": len(work.source.labels),
        "settings": asdict(work.settings),
        "versions": _versions(work.source),
        "refused": [
            *work.refused_before,
            *(
                {"name": names[int(work.order[place])], "reason": reason}
                for place, reason in sorted(journal.reasons.items())
            ),
        ],
    }


def _fingerprint(work: Work) -> str:
    """One line that changes with everything that determines the bytes of the outputs."""
    digest = hashlib.sha256()
    for name in work.source.names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    for array in (work.source.labels, work.order, *work.source.targets.values()):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(json.dumps([work.source.classes, list(work.source.targets)]).encode())
    outputs = [[type(output).__name__, output.final.name, output.describe()] for output in work.outputs]
    described = [
        work.head,
        work.known,
        asdict(work.settings),
        outputs,
        _versions(work.source),
        digest.hexdigest(),
    ]
    return json.dumps(described, sort_keys=True)


# -------------------------------------------------------------------- the disk


def journal_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.journal")


def check_targets(beton: Path | None, tars: Path | None, overwrite: bool, journaled: bool = True) -> None:
    """Raise InputError if a target exists, unless it may be overwritten or, with `journaled`, a journal
    exists: the target may then come from a conversion that was killed between two renames."""
    first = beton or tars
    assert first is not None
    if beton is not None and beton.is_dir():
        raise InputError(f"{beton}: is a folder; give the name of a file, such as {beton / 'train.beton'}")
    if journaled and journal_path(first).exists():
        return
    there = []
    if beton is not None:
        there += [path for path in (beton, beton.with_name(beton.name + ".json")) if path.exists()]
    if tars is not None:
        if tars.is_file():
            raise InputError(f"{tars}: is a file; the tars need a folder")
        entries = sorted(path.name for path in tars.iterdir()) if tars.is_dir() else []
        there += [tars] if entries else []
        if overwrite and (strange := [name for name in entries if not is_of_tars(name)]):
            raise InputError(
                f"{tars}: has other files than a conversion's ({strange[0]}), which --overwrite would "
                "remove; name another folder"
            )
    if there and not overwrite:
        raise InputError(f"{there[0]}: exists; remove it, or replace it with --overwrite")


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and its parents, and return those that didn't exist, innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from error
    return missing


def _remove(journal: Path, outputs: list[Output]) -> None:
    for output in outputs:
        output.remove()
    with suppress(OSError):  # it doesn't exist, or its folder never did
        journal.unlink()


def _remove_folders(made: list[Path]) -> None:
    for folder in made:
        with suppress(OSError):  # it has other files by now
            folder.rmdir()


def _versions(source: Dataset) -> dict[str, str]:
    return {**_own_versions(), **source.libraries}


@cache  # searching the installed packages takes a millisecond
def _own_versions() -> dict[str, str]:
    try:
        own = version("lvssl")
    except PackageNotFoundError:  # run from a checkout that isn't installed
        own = "unknown"
    return {"lvssl": own, "numpy": np.__version__, "pillow": version("pillow"), "jpeg": jpeg.library()}
