"""How fast are two views of an image loaded? Compares this loader with stock FFCV, DALI and torchvision.

    python -m benchmarks.loader --cache CACHE --json FILE          some 5 minutes on two cores

All contenders get the same JPEG bytes: the sample's 1,000 images at max_resolution 400, converted once by
`convert-beton` and kept under --cache as a beton and as files. All do the same work with two threads or
processes: random resized crops of 224 px and flips, to uint8 in memory. Each round runs all contenders in
turn, each once the one before is idle: DALI goes on making batches after an epoch. A ratio is the median of
the rounds' ratios. Set-up, compilation and the first epoch aren't timed.
`cpu_ratios` compare processor time instead of wall-clock time, which is more reliable on a machine that isn't
idle. `first_batch` is a second process's wait for its first batch after the imports, which shows compilation.

    two_views            this loader on the beton: one decode, two anti-aliased crops
    two_views_folder     this loader on the files
    ffcv_one_view        stock FFCV: one decode, one area crop (OpenCV)
    ffcv_two_view        stock FFCV, two pipelines on one field: two decodes
    dali_two_decodes     DALI: decoders.image_random_crop twice
    dali_two_crops       DALI: one decode, two random_resized_crops
    torchvision          DataLoader, PIL decode, two RandomResizedCrop
    decode_only          libjpeg-turbo alone: the floor for one decode per image
    augmented            this loader with all of SimCLR's augmentation, float32 (the input of training)
"""

import argparse
import ctypes
import importlib
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks.conversion import SHARED
from benchmarks.peers import versions_of
from benchmarks.script import new_file, parser_of, save
from lvssl.commands.main import guarded
from lvssl.runs.run import versions
from pipelines.convert.conversion import Settings, convert
from pipelines.decode import turbo
from pipelines.decode.beton import BetonReader
from pipelines.decode.images import ImageReader
from pipelines.errors import InputError
from pipelines.files import write_atomically
from pipelines.formats import turbojpeg
from pipelines.formats.beton import RAW, BetonWriter
from pipelines.loader import LoaderSettings, TwoViewLoader
from pipelines.views import ViewSettings

SIDE = 224
PACKAGES = ("ffcv", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "pillow", "numba", "opencv-python")
DECODES = {"ffcv_two_view": 2, "dali_two_decodes": 2}  # decodes per image; 1 for the others
VIEWS = {"ffcv_one_view": 1, "decode_only": 0}  # 2 for the others
PEERS = ("ffcv_one_view", "ffcv_two_view", "dali_two_decodes", "dali_two_crops", "torchvision")
Epoch = Callable[[], int]  # runs an epoch and returns the number of images


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--cache", type=Path, default=Path("data/benchmark-loader"))
    parser.add_argument("--json", type=new_file, help="where the figures go")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2, help="threads or processes of each contender")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--only", nargs="+", help="contenders; two_views is always among them")
    options = parser.parse_args(arguments)

    if min(options.rounds, options.workers, options.batch_size) < 1:
        raise InputError("--rounds, --workers and --batch-size must be at least 1")
    if turbojpeg.FOUND is None:
        raise InputError("this benchmark needs libturbojpeg (`make install` fetches it)")
    beton, files = same_bytes(options.data, options.cache)
    total = len(BetonReader(beton))
    if total % options.batch_size:
        raise InputError(f"--batch-size must divide {total:,}: FFCV and DALI leave out what remains")
    contenders, absent = prepare(options, beton, files)
    for name, epoch in contenders.items():
        images = epoch()  # compiles, starts workers and fills the page cache
        assert images == total, f"{name} gave {images} images"
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, epoch in contenders.items():
            wait_until_idle()
            started, cpu_started = time.perf_counter(), time.process_time()
            images = epoch()
            seconds[name].append((time.perf_counter() - started) / images)
            cpu[name].append((time.process_time() - cpu_started) / images)
    result = {
        "versions": versions() | versions_of(*PACKAGES),
        "workers": options.workers,
        "rows": [row(name, seconds[name], cpu[name], options.workers) for name in contenders],
        "absent": absent,
        "ratios": ratios(seconds),
        "cpu_ratios": ratios({name: each for name, each in cpu.items() if name != "torchvision"}),
        "first_batch": {name: first_batch(name, beton) for name in ("augmented", "ffcv_one_view")},
        "profile_ms": profile(BetonReader(beton)),
        "python_lock_ms": python_lock(options.cache / "pixels.beton"),
    }
    show(result)
    save(options.json, "loader", arguments, result)


def wait_until_idle(pause: float = 0.05, most: float = 5.0) -> None:
    """Until this process's threads use no processor time, nor wait for a processor: the work of one contender
    isn't another's."""
    end = time.perf_counter() + most
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(pause)
        if not any_runnable() and time.process_time() - used < 0.1 * pause:
            return


def any_runnable() -> bool:
    """Whether another thread of this process runs or waits for a processor; False if the system can't say."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # it has ended
            number, _, state = stat.read_text().rpartition(")")
            if state.split()[0] == "R" and number.split()[0] != str(threading.get_native_id()):
                return True
    return False


# -------------------------------------------------------------------- the data


def same_bytes(tar: Path, cache: Path) -> tuple[Path, Path]:
    """The beton and a folder with its JPEGs as files, made once for each tar."""
    cache = cache / tar.stem
    beton, files = cache / "sample.beton", cache / "files"
    if not beton.is_file():
        if not tar.is_file():
            raise InputError(f"{tar}: no such file; name the ImageNet sample's tar with --data")
        cache.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tar) as archive:
            archive.extractall(cache / "originals", filter="data")
        convert(str(cache / "originals"), beton, Settings(max_resolution=400))
    source = BetonReader(beton)
    assert (source.file.modes == turbo.JPEG).all()
    for index in range(len(source)):
        path = files / f"{source.labels[index]:04d}" / f"{index:04d}.jpg"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, source.encoded(0, index))
    return beton, files


# -------------------------------------------------------------- the contenders


def prepare(options: argparse.Namespace, beton: Path, files: Path) -> tuple[dict[str, Epoch], dict[str, str]]:
    """{name: epoch} of each requested contender; and the reasons why others are missing."""
    workers, batch = options.workers, options.batch_size
    makers: dict[str, Callable[[], Epoch]] = {
        "two_views": lambda: ours(BetonReader(beton), workers, batch, crops_only=True),
        "two_views_folder": lambda: ours(ImageReader(files), workers, batch, crops_only=True),
        "augmented": lambda: ours(BetonReader(beton), workers, batch),
        "decode_only": lambda: decode_only(BetonReader(beton), workers),
        "ffcv_one_view": lambda: stock_ffcv(beton, workers, batch, 1),
        "ffcv_two_view": lambda: stock_ffcv(beton, workers, batch, 2),
        "dali_two_decodes": lambda: dali(files, workers, batch, decode_twice=True),
        "dali_two_crops": lambda: dali(files, workers, batch, decode_twice=False),
        "torchvision": lambda: torchvision_loader(files, workers, batch),
    }
    wanted = ["two_views", *(options.only or [name for name in makers if name != "two_views"])]
    if unknown := set(wanted) - set(makers):
        raise InputError(f"--only {unknown.pop()}: unknown; known are {', '.join(makers)}")
    contenders, absent = {}, {}
    for name in dict.fromkeys(wanted):
        try:
            contenders[name] = makers[name]()
        except ImportError as error:
            absent[name] = str(error)
        except (OSError, RuntimeError) as error:  # installed, but a library of its own is missing
            if name not in PEERS:
                raise
            absent[name] = str(error).strip().splitlines()[0]
    return contenders, absent


def ours(source: Any, workers: int, batch: int, **how: Any) -> Epoch:
    loader = TwoViewLoader(
        source, ViewSettings(resolution=SIDE), LoaderSettings(batch, workers=workers, **how)
    )
    return lambda: sum(batch.views.shape[1] for batch in loader)


def decode_only(source: BetonReader, workers: int) -> Epoch:
    """One-pixel crops: decoding, and almost nothing else."""
    from pipelines.loader import Threads

    boxes = np.tile(np.array([0, 0, 1, 1], np.int32), (len(source), 1, 1))
    threads = Threads(workers)

    def make(part: slice) -> None:
        source.crops(
            np.arange(part.start, part.stop),
            boxes[part],
            np.empty((part.stop - part.start, 1, 8, 8, 3), np.uint8),
        )

    def epoch() -> int:
        threads.run(make, len(source), len(source))()
        return len(source)

    return epoch


def stock_ffcv(beton: Path, workers: int, batch: int, views: int) -> Epoch:
    loader = ffcv_loader(beton, workers, batch, views)
    return lambda: sum(len(batch[0]) for batch in loader)


def ffcv_loader(beton: Path, workers: int, batch: int, views: int) -> Any:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    pipelines: dict[str, Any] = {"label": [IntDecoder(), ToTensor()]}
    for view in range(views):
        pipelines["image" if view == 0 else f"image{view}"] = PipelineSpec(
            "image", RandomResizedCropRGBImageDecoder((SIDE, SIDE)), [RandomHorizontalFlip(), ToTensor()]
        )
    return Loader(
        str(beton), batch_size=batch, num_workers=workers, order=OrderOption.RANDOM, os_cache=True,
        drop_last=True, pipelines=pipelines,
    )  # fmt: skip


def dali(files: Path, workers: int, batch: int, decode_twice: bool) -> Epoch:
    nvidia: Any = importlib.import_module("nvidia.dali")  # its type stubs are incomplete
    fn, types = nvidia.fn, nvidia.types
    paths = sorted(map(str, files.glob("*/*.jpg")))

    @nvidia.pipeline_def(batch_size=batch, num_threads=workers, device_id=None, seed=0)
    def two_views() -> Any:
        encoded, labels = fn.readers.file(files=paths, random_shuffle=True, name="files", initial_fill=256)
        crop = {"random_area": [0.08, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3]}
        if decode_twice:
            views = [
                fn.resize(fn.decoders.image_random_crop(encoded, **crop), size=[SIDE, SIDE]) for _ in range(2)
            ]
        else:
            image = fn.decoders.image(encoded)
            views = [fn.random_resized_crop(image, size=[SIDE, SIDE], **crop) for _ in range(2)]
        views = [fn.flip(view, horizontal=fn.random.coin_flip()) for view in views]
        return (*(fn.cast(view, dtype=types.UINT8) for view in views), labels)

    pipe = two_views()
    pipe.build()

    def epoch() -> int:
        for _ in range(len(paths) // batch):
            first, second, _ = pipe.run()
            np.asarray(first.as_array()), np.asarray(second.as_array())
        return len(paths) // batch * batch

    return epoch


class TwoViewFiles(torch.utils.data.Dataset):
    """The usual torchvision data set: PIL decodes, two random resized crops with flips, uint8 tensors."""

    def __init__(self, files: Path) -> None:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        self.images = ImageFolder(str(files))
        self.view = v2.Compose(
            [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index]
        return self.view(image), self.view(image), label


def torchvision_loader(files: Path, workers: int, batch: int) -> Epoch:
    loader = torch.utils.data.DataLoader(
        TwoViewFiles(files), batch, shuffle=True, num_workers=workers, persistent_workers=True
    )
    return lambda: sum(len(batch[0]) for batch in loader)


# ----------------------------------------------------------------- the figures


def row(name: str, seconds: list[float], cpu: list[float], workers: int) -> dict[str, Any]:
    rates = sorted(1 / each for each in seconds)
    rate = statistics.median(rates)
    return {
        "name": name,
        "images_per_second": rate,
        "images_per_second_per_core": rate / workers,
        # of this process only: torchvision's workers are other processes
        "cpu_ms_per_image": None if name == "torchvision" else statistics.median(cpu) * 1e3,
        "lowest": rates[0],
        "highest": rates[-1],
        "views": VIEWS.get(name, 2),
        "decodes_per_image": DECODES.get(name, 1),
    }


FIRST_BATCH = """if True:
    import sys, time
    from pathlib import Path
    from benchmarks.loader import SIDE, BetonReader, LoaderSettings, TwoViewLoader, ViewSettings, ffcv_loader
    name, beton = sys.argv[1], Path(sys.argv[2])
    if name == "ffcv_one_view":
        import ffcv.fields.decoders, ffcv.loader, ffcv.transforms
    started, spent = time.perf_counter(), time.process_time()
    if name == "ffcv_one_view":
        next(iter(ffcv_loader(beton, 2, 50, 1)))
    else:
        settings = LoaderSettings(50, workers=2)
        next(iter(TwoViewLoader(BetonReader(beton), ViewSettings(resolution=SIDE), settings)))
    print(time.perf_counter() - started, time.process_time() - spent, flush=True)
    import os
    os._exit(0)
"""


def first_batch(name: str, beton: Path) -> dict[str, float] | None:
    """Seconds from the end of the imports to the first batch of 50, in the second of two processes."""
    if name == "ffcv_one_view" and importlib.util.find_spec("ffcv") is None:
        return None
    command = [sys.executable, "-c", FIRST_BATCH, name, str(beton)]
    for _ in range(2):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, processor = map(float, said.split())
    return {"seconds": seconds, "processor_seconds": processor}


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median over rounds of the peer's time over ours, so that drift of the machine cancels out."""

    def over(*peers: str, mine: str = "two_views") -> float | None:
        if not all(peer in seconds for peer in peers):
            return None
        return min(
            statistics.median(theirs / own for theirs, own in zip(seconds[peer], seconds[mine]))
            for peer in peers
        )

    found = {
        "two_view_over_ffcv_one_view": over("ffcv_one_view"),
        "two_view_over_ffcv_two_view": over("ffcv_two_view"),
        "two_view_over_dali": over("dali_two_decodes", "dali_two_crops"),  # the better of the two
        "two_view_over_torchvision": over("torchvision"),
        "two_view_over_decode_only": over("decode_only"),
    }
    return {name: value for name, value in found.items() if value is not None}


def profile(source: BetonReader, rounds: int = 5) -> dict[str, float]:
    """Milliseconds per image on one thread: how the time of two views is spent.

    Differences between libjpeg-turbo's own modes split the decoder: at 1/8 of the size in grey it does little
    but Huffman decoding; in grey it adds the luma's IDCT; and in RGB the chroma's, upsampling and conversion.
    """
    library = ctypes.CDLL(turbojpeg.file())
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDecompress2.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, *[ctypes.c_int] * 5,
    ]  # fmt: skip
    handle = library.tjInitDecompress()
    chosen = np.arange(0, len(source), 4)
    heights, widths = source.sizes(chosen)
    stored = [np.frombuffer(source.encoded(0, int(i)), np.uint8) for i in chosen]
    pixels = np.empty(int((heights * widths).max()) * 3, np.uint8)

    def decoded(pixel_format: int, scale: int) -> None:
        for data, height, width in zip(stored, heights.tolist(), widths.tolist()):
            size = -(-width // scale), 0, -(-height // scale)
            place = data.ctypes.data, len(data), pixels.ctypes.data
            assert library.tjDecompress2(handle, *place, *size, pixel_format, 0) == 0

    from pipelines.parameters import crop_boxes, draw_parameters

    boxes = crop_boxes(draw_parameters(ViewSettings(), 0, 0, chosen, heights, widths))
    crops = np.empty((len(chosen), 2, SIDE, SIDE, 3), np.uint8)
    steps: dict[str, Callable[[], Any]] = {
        "huffman": lambda: decoded(6, 8),
        "grey": lambda: decoded(6, 1),
        "decode": lambda: decoded(0, 1),
        "all": lambda: source.crops(chosen, boxes, crops),
        "copy": lambda: crops.copy(),
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.thread_time()
            step()
            taken[name].append((time.thread_time() - started) / len(chosen) * 1e3)
    ms = {name: statistics.median(each) for name, each in taken.items()}
    return {
        "huffman_decoding": ms["huffman"],
        "luma_idct": ms["grey"] - ms["huffman"],
        "chroma_idct_upsampling_colour": ms["decode"] - ms["grey"],
        "two_resized_crops": ms["all"] - ms["decode"],
        "copy_of_two_crops": ms["copy"],
        "decoder_alone": ms["decode"],
        "decoder_and_crops": ms["all"],
    }


def python_lock(beton: Path, images: int = 16_384, rounds: int = 5) -> float:
    """An upper bound of the milliseconds per image during which the GIL is held: the whole cost of 8 px crops
    of one-pixel images stored as pixels, for which the compiled part, which releases the GIL, takes almost no
    time."""
    with open(beton, "wb") as file:
        writer = BetonWriter(file, images)
        for _ in range(images):
            writer.add(RAW, 1, 1, bytes(3), 0)
        writer.finish()
    view, how = ViewSettings(resolution=8), LoaderSettings(256, workers=1, crops_only=True)
    with TwoViewLoader(BetonReader(beton), view, how) as loader:
        taken = []
        for _ in range(1 + rounds):
            started = time.process_time()
            made = sum(batch.views.shape[1] for batch in loader)
            taken.append((time.process_time() - started) / made * 1e3)
    return statistics.median(taken[1:])


def show(result: dict[str, Any]) -> None:
    print(f"{'':20}{'img/s':>8}{'a core':>8}{'lowest':>8}{'highest':>9}{'views':>7}{'decodes':>9}")
    for r in result["rows"]:
        print(
            f"{r['name']:20}{r['images_per_second']:8.0f}{r['images_per_second_per_core']:8.0f}"
            f"{r['lowest']:8.0f}{r['highest']:9.0f}{r['views']:7}{r['decodes_per_image']:9}"
        )
    for name, why in result["absent"].items():
        print(f"{name:20}absent: {why}")
    print()
    for name, value in result["ratios"].items():
        cpu = result["cpu_ratios"].get(name)
        print(f"{name:32}{value:6.2f}" + (f"   (processor time {cpu:.2f})" if cpu else ""))
    for name, first in result["first_batch"].items():
        if first:
            print(f"{name:20}first batch of a second process after {first['seconds']:.2f} s")
    print("\nms an image, one thread")
    for name, value in result["profile_ms"].items():
        print(f"{name:32}{value:6.3f}")
    print(f"{'with the lock of Python':32}{result['python_lock_ms']:6.3f}")
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
