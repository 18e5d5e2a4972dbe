"""Source -> beton and its manifest: each image decoded once, checked, and stored as it came if possible."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from pipelines.convert import jpeg
from pipelines.convert.beton import JPEG, LONGEST_SIDE, RAW, VERSION, BetonWriter, written_aside
from pipelines.convert.readers import Source, as_rgb, decode_other, open_source, upright
from pipelines.errors import InputError

SMALL = 64 * 64  # pixels; a lossless image of at most so many is stored raw: cheaper to read, hardly larger
NAMES_LIMIT = 100_000  # images; a manifest of more leaves their names out
CHUNK = 8  # images a task: a future costs some 40 us, a CIFAR image as much


@dataclass(frozen=True)
class Settings:
    """What is stored, and of which images. The bytes of a beton follow from these and the source alone."""

    max_resolution: int | None = None  # longest side in pixels; larger images are shrunk and re-encoded
    jpeg_quality: int = 90  # of what has to be encoded, 1 to 100
    raw: bool = False  # store RGB pixels of everything: large, but nothing to decode
    subset: int | None = None  # so many images, balanced over the classes
    shuffle_seed: int | None = None  # None keeps the source's order; the subset is drawn with 0 then
    on_error: str = "refuse"  # a damaged image: "refuse" leaves it out, by name; "fail" stops

    def check(self) -> None:
        """Raises InputError for a value out of range."""
        if self.max_resolution is not None and not 1 <= self.max_resolution <= LONGEST_SIDE:
            raise InputError(f"--max-resolution {self.max_resolution}: must be within 1 and {LONGEST_SIDE}")
        if not 1 <= self.jpeg_quality <= 100:
            raise InputError(f"--jpeg-quality {self.jpeg_quality}: must be within 1 and 100")
        if self.subset is not None and self.subset < 1:
            raise InputError(f"--subset {self.subset}: must be at least 1")
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 2**32:
            raise InputError(f"--shuffle-seed {self.shuffle_seed}: must be within 0 and {2**32 - 1}")
        if self.on_error not in ("refuse", "fail"):
            raise InputError(f"--on-error {self.on_error}: must be refuse or fail")


@dataclass(frozen=True)
class Stored:
    """One image as it goes into the beton."""

    mode: int  # JPEG or RAW
    height: int
    width: int
    data: bytes | memoryview
    how: str  # "jpeg_untouched", "reencoded" or "raw"
    turned: bool = False  # EXIF's orientation was applied


def convert(
    source: str,
    out: str | Path,
    settings: Settings = Settings(),
    *,
    split: str | None = None,
    root: str | Path = "data",
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the beton `out` and its manifest `out`.json, and return the manifest.

    Both appear complete or not at all, and hold the same bytes whatever `workers` (threads; None: one a
    core) is. `progress` shows a bar if stderr is a terminal. The manifest that is returned, not the file,
    also has "seconds" and "notes". Raises InputError for everything that the user can mend.
    """
    settings.check()
    out = Path(out)
    manifest_path = out.with_name(out.name + ".json")
    _check_target(out, manifest_path, overwrite)
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")
    opened = open_source(source, split, root)
    order = select(opened.labels, settings.subset, settings.shuffle_seed)

    started = time.perf_counter()
    made = _make_folders(out.parent)
    try:
        with written_aside(out) as file:
            manifest = _write_beton(file, opened, order, settings, workers or _cores(), progress)
            manifest = {"format_version": VERSION, "source": source, "split": opened.split, **manifest}
            with written_aside(manifest_path) as beside:
                beside.write(json.dumps(manifest, indent=1).encode())
    except BaseException as error:
        for folder in made:
            folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{out}: cannot be written ({error.strerror})") from error
        raise
    seconds = time.perf_counter() - started
    return {**manifest, "seconds": seconds, "notes": opened.notes}


def select(labels: np.ndarray, subset: int | None, shuffle_seed: int | None) -> np.ndarray:
    """Positions of the images to store, in the order to store them, int64 [subset or N].

    The subset takes as many of each class as the classes allow, at random; the same seed gives the same
    one, with or without shuffling by it. Raises InputError if it is larger than the data.
    """
    total = len(labels)
    if subset is not None and subset > total:
        raise InputError(f"--subset {subset}: the source has only {total} images")
    order = np.arange(total)
    if subset is not None and subset < total:
        random = np.random.RandomState(shuffle_seed or 0)  # frozen: the same draw in every NumPy release
        shuffled = random.permutation(total)
        # The r-th image of its class (in random order) is taken in round r; sort by round, ties at random.
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        counts = np.unique(labels, return_counts=True)[1]
        rounds = np.concatenate([np.arange(count) for count in counts])
        ties = random.permutation(total)
        order = np.sort(by_class[np.lexsort((ties, rounds))[:subset]])
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(order)
    return order


def store(image: bytes | np.ndarray, settings: Settings) -> Stored:
    """Check one image (a file's bytes, or pixels) and bring it to the form in which it is stored.

    A JPEG that FFCV can read and that is not too large keeps its bytes. Raises jpeg.DamagedImage.
    """
    if isinstance(image, np.ndarray):
        return _store_pixels(as_rgb(image), settings, small_is_raw=True)
    if not image:
        raise jpeg.DamagedImage("the file is empty")
    if not jpeg.is_jpeg(image):
        pixels, orientation = decode_other(image)
        pixels = upright(pixels, orientation)
        return _store_pixels(pixels, settings, small_is_raw=True, turned=orientation != 1)
    header = jpeg.read_header(image)
    size = _target_size(header.height, header.width, settings.max_resolution)
    same_size = size == (header.height, header.width)
    if header.is_rgb_or_grey and header.orientation == 1 and same_size and not settings.raw:
        jpeg.check(image, header)
        return Stored(JPEG, *size, image, "jpeg_untouched")
    pixels = jpeg.decode(image, header, None if same_size else size)
    if not same_size:
        pixels = area_resize(pixels, *size)
    turned = header.orientation != 1
    return _store_pixels(upright(pixels, header.orientation), settings, small_is_raw=False, turned=turned)


def _store_pixels(pixels: np.ndarray, settings: Settings, small_is_raw: bool, turned: bool = False) -> Stored:
    height, width = pixels.shape[:2]
    size = _target_size(height, width, settings.max_resolution)
    if size != (height, width):
        pixels = area_resize(pixels, *size)
    if settings.raw or (small_is_raw and size[0] * size[1] <= SMALL):
        return Stored(RAW, *size, np.ascontiguousarray(pixels).tobytes(), "raw", turned)
    return Stored(JPEG, *size, jpeg.encode(pixels, settings.jpeg_quality), "reencoded", turned)


def _target_size(height: int, width: int, max_resolution: int | None) -> tuple[int, int]:
    """(height, width) with the longest side at most max_resolution; rounded down, but not to 0."""
    longest = max(height, width)
    if longest > LONGEST_SIDE and max_resolution is None:
        raise jpeg.DamagedImage(
            f"{width} x {height} is too large (side over {LONGEST_SIDE}); set --max-resolution"
        )
    if max_resolution is None or longest <= max_resolution:
        return height, width
    return max(1, height * max_resolution // longest), max(1, width * max_resolution // longest)


def area_resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrink uint8 [H, W, 3] to [height, width, 3]: every pixel is the mean of the area that it covers."""
    from pipelines.convert.area import shrink  # numba takes a second to load, and few conversions need it

    return shrink(np.ascontiguousarray(pixels), height, width)


# ------------------------------------------------------------------- the whole


def _write_beton(
    file: IO[bytes], source: Source, order: np.ndarray, settings: Settings, workers: int, progress: bool
) -> dict[str, Any]:
    """Write the beton into an open file and return what the manifest says about it."""
    writer = BetonWriter(file, capacity=len(order))
    names: list[str] = []
    refused: list[dict[str, str]] = []
    counts = {"jpeg_untouched": 0, "reencoded": 0, "raw": 0}
    turned = 0
    bar = tqdm(total=len(order), unit="img", smoothing=0.1, disable=None if progress else True)
    with bar, closing(_in_order(source, order, settings, workers)) as images:
        for index, stored in images:
            bar.update()
            name = source.names[index]
            if isinstance(stored, str):
                if settings.on_error == "fail":
                    raise InputError(f"{name}: {stored}; mend it, or leave it out by --on-error refuse")
                refused.append({"name": name, "reason": stored})
                bar.set_postfix(refused=len(refused))
                continue
            writer.add(stored.mode, stored.height, stored.width, stored.data, int(source.labels[index]))
            names.append(name)
            counts[stored.how] += 1
            turned += stored.turned
    if writer.count == 0:
        first = "{name}: {reason}".format(**refused[0])
        raise InputError(f"none of the {len(order)} files is an image that can be stored; the first, {first}")
    writer.finish()
    file.flush()
    os.fsync(file.fileno())  # now, so that a full disk is known before the manifest appears
    size = file.seek(0, os.SEEK_END)
    image, label = writer.metadata["f0"][: writer.count], writer.metadata["f1"][: writer.count]
    return {
        "count": writer.count,
        "bytes": size,
        "sha256": _sha256(file),
        "classes": source.classes,
        "class_counts": np.bincount(label, minlength=len(source.classes)).tolist(),
        "heights": _spread(image["height"]),
        "widths": _spread(image["width"]),
        "stored": {**counts, "turned_upright": turned},
        "source_count": len(source.labels),
        "settings": asdict(settings),
        "versions": _versions(source),
        "refused": refused,
        "names": names if writer.count <= NAMES_LIMIT else None,
    }


def _in_order(
    source: Source, order: np.ndarray, settings: Settings, workers: int
) -> Generator[tuple[int, Stored | str], None, None]:
    """(position in the source, image or the reason why it is none), in the order given.

    Threads are enough: file reading, JPEG, PNG and the resize all leave Python's lock. Only so many
    chunks are under way at a time, so that memory doesn't grow with the data.
    """

    def work(chunk: np.ndarray) -> list[tuple[int, Stored | str]]:
        return [(int(index), _attempt(source, int(index), settings)) for index in chunk]

    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    under_way: deque[Future] = deque()
    try:
        for start in range(0, len(order), CHUNK):
            under_way.append(pool.submit(work, order[start : start + CHUNK]))
            if len(under_way) > 2 * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _attempt(source: Source, index: int, settings: Settings) -> Stored | str:
    try:
        return store(source.read(index), settings)
    except jpeg.DamagedImage as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _check_target(out: Path, manifest: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the name of a file, such as {out / 'train.beton'}")
    for path in (out, manifest):
        if path.exists() and not overwrite:
            raise InputError(f"{path}: exists; remove it, or replace it by --overwrite")


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and its parents, and return those that weren't there, innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror})") from error
    return missing


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _versions(source: Source) -> dict[str, str]:
    try:
        own = version("lvssl")
    except PackageNotFoundError:  # run from a checkout that was never installed
        own = "unknown"
    libraries = {"numpy": np.__version__, "pillow": version("pillow"), "jpeg": jpeg.library()}
    return {"lvssl": own, **libraries, **source.libraries}
