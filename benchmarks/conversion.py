"""How fast is conversion, compared with FFCV's own writer on the same images with as many workers?

    python -m benchmarks.conversion --json FILE                    # ../shared/data's 1,000 ImageNet JPEGs
    python -m benchmarks.conversion --images FOLDER_OR_TAR --workers 8 --repeats 5

Each row is the median of --repeats runs, which alternate between rows, each in its own process, on images
that have just been written and so are in the page cache:

    lossless                    JPEG bytes kept, every image checked, as in `convert-beton`
    lossless, unchecked         the same without the check, to show its cost
    lossless, both              a beton and tars from one pass
    ffcv                        DatasetWriter, images re-encoded at quality 90: it can't keep them
    re-encode                   --max-resolution 400 --jpeg-quality 90
    ffcv re-encode              DatasetWriter with max_resolution=400, jpeg_quality=90
    lossless, larger            the images --larger times over (hard links), where fixed costs become
    ffcv, larger                negligible, as for ImageNet's 1.28 million; one run each
    memory                      peak of the process with 1,000 and with 20,000 images (repeated)

Both are timed from the call to the finished file, in a process that has imported what it needs. Our time
includes listing the folder, estimating the size, checking and digesting every image, syncing everything to
disk, the manifest, and renaming. FFCV's time includes starting its worker processes, but not listing the
images. FFCV makes no estimate, check, digest or manifest, and leaves the file in the page cache.

Ratios: lossless_over_ffcv_writer (checked), lossless_unchecked_over_ffcv_writer, reencode_over_ffcv_writer;
lossless_larger_over_ffcv_writer, for the larger runs; memory_growth, the peak at 20,000 over that at 1,000.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.script import new_file, parser_of, save
from pipelines.cores import cores
from pipelines.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared/data/imagenet-sample/imagenet-1k-one-per-class.tar"
OURS = {
    "lossless": {},
    "lossless, unchecked": {"check": False},
    "lossless, both": {"tars": True},
    "re-encode": {"max_resolution": 400},
}
FFCV = {"ffcv": None, "ffcv re-encode": 400}
LARGER = ("lossless", "ffcv")  # rows whose larger runs are compared


class Images:
    """A data set for FFCV's writer: (PIL image, label) by index. At module level, so workers can load it."""

    def __init__(self, folder: Path):
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.open(self.files[index]).convert("RGB"), index


def ours(
    folder: Path, out: Path, workers: int, check: bool = True, tars: bool = False, **settings: Any
) -> float:
    """Seconds of one conversion, after a conversion of a few images that loads and compiles everything."""
    from pipelines.convert.conversion import ConvertOptions, Settings, convert
    from pipelines.formats import jpeg

    if not check:
        jpeg.check = lambda data, header: None
    convert(str(folder), out / "warm.beton", Settings(subset=8, **settings), ConvertOptions(workers=workers))
    beside = out / "tars" if tars else None
    started = time.perf_counter()
    options = ConvertOptions(workers=workers, webdataset=beside)
    manifest = convert(str(folder), out / "x.beton", Settings(**settings), options)
    seconds = time.perf_counter() - started
    assert not manifest["refused"]
    return seconds


def theirs(folder: Path, out: Path, workers: int, max_resolution: int | None) -> float:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField("jpg", max_resolution=max_resolution, jpeg_quality=90)
    writer = DatasetWriter(str(out / "x.beton"), {"image": image, "label": IntField()}, num_workers=workers)
    images = Images(folder)
    started = time.perf_counter()
    writer.from_indexed_dataset(images, chunksize=25)
    return time.perf_counter() - started


def peak_of(folder: Path, out: Path, workers: int, count: int) -> int:
    """Peak memory in bytes of converting `count` images, from a table that repeats the folder's images."""
    from pipelines.convert.conversion import ConvertOptions, convert

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    table = out / "x.csv"
    table.write_text("path,label\n" + "".join(f"{files[i % len(files)]},0\n" for i in range(count)))
    convert(str(table), out / "x.beton", options=ConvertOptions(workers=workers))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(arguments: list[str]) -> None:
    """Run one arm once, in its own process, and print its measurement."""
    name, folder, workers, count = arguments[0], Path(arguments[1]), int(arguments[2]), int(arguments[3])
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        if name == "memory":
            print(peak_of(folder, Path(out), workers, count))
        elif name in OURS:
            print(ours(folder, Path(out), workers, **OURS[name]))  # type: ignore[arg-type]
        else:
            print(theirs(folder, Path(out), workers, FFCV[name]))


def repeated(folder: Path, times: int) -> Path:
    """The same class folders with every image repeated `times` times, as links to the same bytes."""
    larger = folder.with_name("larger")
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        target = larger / path.relative_to(folder).parent
        target.mkdir(parents=True, exist_ok=True)
        for number in range(times):
            (target / f"{number}-{path.name}").hardlink_to(path)
    return larger


def measured(name: str, folder: Path, workers: int, count: int = 0) -> float:
    command = ["-m", "benchmarks.conversion", "--one", name, str(folder), str(workers), str(count)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise InputError(f"{name} failed: {said[-1] if said else f'status {done.returncode}'}")
    return float(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--images", type=Path, default=SHARED, help="a folder of class folders, or a tar of them"
    )
    parser.add_argument("--workers", type=int, default=cores(), help="of each (default: one a core)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--many", type=int, default=20_000, help="images of the large memory run; 0 leaves it out"
    )
    parser.add_argument(
        "--larger", type=int, default=5, help="times over in the larger runs (default: 5; 0 leaves them out)"
    )
    parser.add_argument("--work", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", type=new_file, help="where the figures go")
    options = parser.parse_args(arguments)
    if min(options.workers, options.repeats) < 1 or min(options.many, options.larger) < 0:
        raise InputError("--workers and --repeats must be at least 1, --many and --larger not below 0")
    if not options.images.exists():
        raise InputError(f"{options.images}: no such folder or tar; name one with --images")
    if importlib.util.find_spec("ffcv") is None:
        raise InputError("this benchmark compares with FFCV's writer: pip install 'lvssl[ffcv]'")
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        folder = Path(work) / "images"
        if options.images.is_file():
            with tarfile.open(options.images) as archive:
                archive.extractall(folder, filter="data")
        else:
            shutil.copytree(options.images, folder)
        result = measure(options, folder)
    show(result)
    save(options.json, "conversion", arguments, result)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    arms = [*OURS, *FFCV]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.repeats):
        for name in arms:
            seconds[name].append(measured(name, folder, options.workers))

    def row(name: str, taken: list[float], times: int = 1) -> dict[str, Any]:
        each = statistics.median(taken) / times  # per pass over the original images
        rate = {"images_per_second": len(files) / each, "megabytes_per_second": megabytes / each}
        return {"name": name, "workers": options.workers, **rate, "seconds": taken}

    rows = [row(name, seconds[name]) for name in arms]
    speed = {row["name"]: row["images_per_second"] for row in rows}
    ratios = {
        "lossless_over_ffcv_writer": speed["lossless"] / speed["ffcv"],
        "lossless_unchecked_over_ffcv_writer": speed["lossless, unchecked"] / speed["ffcv"],
        "reencode_over_ffcv_writer": speed["re-encode"] / speed["ffcv re-encode"],
    }
    if options.larger:
        larger = repeated(folder, options.larger)
        taken = {name: measured(name, larger, options.workers) for name in LARGER}
        for name in LARGER:
            larger_row = row(f"{name}, larger", [taken[name]], options.larger)
            rows.append(larger_row | {"images": len(files) * options.larger})
        ratios["lossless_larger_over_ffcv_writer"] = taken["ffcv"] / taken["lossless"]
    if options.many:
        peaks = {count: measured("memory", folder, options.workers, count) for count in (1000, options.many)}
        rows += [
            {"name": "memory", "images": count, "peak_bytes": int(peak)} for count, peak in peaks.items()
        ]
        ratios["memory_growth"] = peaks[options.many] / peaks[1000]
    libraries = {name: version(name) for name in ("ffcv", "numpy", "numba", "pillow")}
    machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "images": len(files),
        "megabytes": megabytes,
        "versions": {**machine, **libraries},
        "rows": rows,
        "ratios": ratios,
    }


def show(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if "peak_bytes" in row:
            print(f"memory, {row['images']:,} images: peak {row['peak_bytes'] / 1e6:,.0f} MB")
        else:
            spread = f"{min(row['seconds']):.2f}-{max(row['seconds']):.2f} s"
            rate = f"{row['images_per_second']:8,.0f} img/s {row['megabytes_per_second']:7,.0f} MB/s"
            print(f"{row['name']:22}{rate}   {spread}")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
    else:
        from lvssl.commands.main import guarded

        sys.exit(guarded(main, sys.argv[1:]))
