"""How closely does the fused augmentation match torchvision, and how much faster is it than its peers?

    python -m benchmarks.augmentation --json FILE                    # about three minutes
    python -m benchmarks.augmentation --data SAMPLE --json FILE      # with the whole path: six

It runs the full SimCLR chain (flip, jitter in random order, grey, blur with 23 taps, normalise) on 224 px
crops of photographs, with float32 output. Each form runs in `--processes` single-threaded processes at
once, so that the GIL slows down none of them. Rounds alternate between the forms; medians are reported.

    torchvision-pil         torchvision.transforms.v2 on PIL images
    pillow-blur             the same with Pillow's blur, as in lightly: box filters, close to a Gaussian
    torchvision-tensor      the same on uint8 tensors, one by one: a batch would share its random draws
    kornia                  AugmentationSequential's operations on a float batch, drawn for each sample
    albumentations          on uint8 arrays, with OpenCV underneath
    reference, numba        ours; the time includes drawing the parameters, as for all others

`--data` (anything that `convert-beton` reads, here a folder of class folders) adds the path from file to
batch: beton -> decode once -> two crops -> augment -> batch in our loader, against torchvision's
DataLoader over the same images as JPEG files (longest side 400 px in both), with `--processes` threads or
workers, and with torchvision's blur or Pillow's.

errors: the numba form against torchvision v2's functional form on float and on uint8 images, in levels of
1/255, by operation; for hue, saturation and contrast at several strengths.

docs/augmentation.md has the figures.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as tv

from benchmarks.gpu_stages.run import processor
from benchmarks.peers import PillowBlur, kornia_chain, torchvision_chain, versions_of
from benchmarks.script import new_file, parser_of, save
from lvssl.commands.main import guarded
from lvssl.runs.run import versions
from pipelines import parameters as columns
from pipelines.augment import augment, cpu, reference
from pipelines.decode.resize import resize_crop
from pipelines.errors import InputError
from pipelines.parameters import P, draw_parameters
from pipelines.views import ViewSettings

VIEW = ViewSettings()
SIDE = VIEW.resolution
BATCH = 32
PEERS = ("torchvision-pil", "pillow-blur", "torchvision-tensor", "kornia", "albumentations")
PACKAGES = (
    "pillow",
    "kornia",
    "albumentations",
    "opencv-python",
    "opencv-python-headless",
    "numba",
    "triton",
)
Form = Callable[[], Any]  # augments BATCH crops


def main(arguments: list[str]) -> None:
    parser = parser_of(__doc__)
    every = [*PEERS, "reference", "numba"]
    parser.add_argument("--forms", nargs="+", default=every, choices=every)
    parser.add_argument("--processes", type=int, default=2, help="at once, single-threaded each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="of one form in one round, at least a batch"
    )
    parser.add_argument("--data", help="images for the whole path")
    parser.add_argument("--epochs", type=int, default=3, help="of the whole path, each form in turn")
    parser.add_argument("--json", type=new_file, help="where the figures go")
    options = parser.parse_args(arguments)
    if min(options.processes, options.rounds, options.epochs) < 1:
        raise InputError("--processes, --rounds and --epochs must be at least 1")

    rows, absent = speeds(options.forms, options.processes, options.rounds, options.seconds)
    if options.data:
        rows += path_speeds(options.data, options.processes, options.epochs)
    result = {
        "machine": {"cores": os.cpu_count(), "processor": processor()},
        "versions": versions() | versions_of(*PACKAGES),
        "rows": rows,
        "absent": absent,
        "ratios": ratios(rows),
        "errors": errors(),
    }
    show(result)
    save(options.json, "augmentation", arguments, result)


# Speed of the augmentation alone


def photographs(count: int, seed: int = 0) -> np.ndarray:
    """Random crops of scikit-learn's two photographs: uint8 [N, R, R, 3]."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    crops = np.empty((count, SIDE, SIDE, 3), np.uint8)
    rng = np.random.default_rng(seed)
    for n in range(count):
        photo = np.ascontiguousarray(photos[n % len(photos)])
        size = int(rng.integers(180, 420))
        top, left = (int(rng.integers(0, length - size + 1)) for length in photo.shape[:2])
        resize_crop(photo, np.array([top, left, size, size], np.int32), crops[n], False)
    return crops


def speeds(
    forms: list[str], processes: int, rounds: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Views per second of each form, over all processes; rounds alternate. And {form: reason} of those whose
    package is missing."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for _ in range(processes):
        here, there = context.Pipe()
        worker = context.Process(target=serve, args=(there, forms), daemon=True)
        worker.start()
        there.close()  # so that a worker that dies ends the waiting for its answers
        pipes.append(here)
        workers.append(worker)
    absent: dict[str, str] = {}
    try:
        for pipe in pipes:
            absent |= pipe.recv()
        present = [form for form in forms if form not in absent]
        found: dict[str, list[float]] = {form: [] for form in present}
        for _ in range(rounds):
            for form in present:
                for pipe in pipes:
                    pipe.send((form, seconds))
                found[form].append(sum(pipe.recv() for pipe in pipes))
    except EOFError:
        raise InputError("a process of the benchmark ended early; what it said is above") from None
    for pipe, worker in zip(pipes, workers):
        pipe.send(None)
        worker.join()
    return [
        {"what": "views", "form": form, "processes": processes, **summary(found[form], "views_per_second")}
        for form in present
    ], absent


def summary(values: list[float], name: str) -> dict[str, Any]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {name: statistics.median(values), "quartiles": [low, high], "each": values}


def serve(pipe: Any, names: list[str]) -> None:
    """Run in a process: time each form whose name arrives, until None does."""
    torch.set_num_threads(1)
    crops = photographs(BATCH)
    forms: dict[str, Form] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            forms[name] = FORMS[name](crops)
        except ImportError as error:
            absent[name] = str(error)
    for name, form in forms.items():
        check_output(name, form())  # warmed up and verified before timing
    pipe.send(absent)
    while (wanted := pipe.recv()) is not None:
        name, seconds = wanted
        started, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds or not count:
            forms[name]()
            count += BATCH
        pipe.send(count / elapsed)


def check_output(name: str, views: Any) -> None:
    """Check that a form returns BATCH normalised float views of 3 channels."""
    first = torch.as_tensor(np.asarray(views[0]))
    assert len(views) == BATCH and sorted(first.shape) == [3, SIDE, SIDE] and first.dtype == torch.float32, (
        name
    )
    values = torch.stack([torch.as_tensor(np.asarray(view)) for view in views])
    assert -2.2 < values.min() < 0 < values.max() < 2.7 and 0.2 < values.std() < 2, name


def torchvision_pil(crops: np.ndarray) -> Form:
    from PIL import Image

    images, chain = [Image.fromarray(crop) for crop in crops], torchvision_chain(VIEW, T.PILToTensor())
    return lambda: [chain(image) for image in images]


def pillow_blur(crops: np.ndarray) -> Form:
    from PIL import Image

    chain = torchvision_chain(VIEW, T.PILToTensor(), blur=PillowBlur(VIEW.sigma))
    images = [Image.fromarray(crop) for crop in crops]
    return lambda: [chain(image) for image in images]


def torchvision_tensor(crops: np.ndarray) -> Form:
    images = [torch.from_numpy(crop).permute(2, 0, 1) for crop in crops]
    chain = torchvision_chain(VIEW)
    return lambda: [chain(image) for image in images]


def kornia(crops: np.ndarray) -> Form:
    chain = kornia_chain(VIEW)
    batch = torch.from_numpy(crops)
    return lambda: chain(batch.permute(0, 3, 1, 2).float() / 255)


def albumentations(crops: np.ndarray) -> Form:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)
    chain = A.Compose([
        A.HorizontalFlip(p=VIEW.flip),
        A.ColorJitter(
            *((1 - s, 1 + s) for s in (VIEW.brightness, VIEW.contrast, VIEW.saturation)),
            (-VIEW.hue, VIEW.hue), p=VIEW.jitter,
        ),
        A.ToGray(p=VIEW.grey),
        A.GaussianBlur(blur_limit=(VIEW.kernel_size,) * 2, sigma_limit=VIEW.sigma, p=VIEW.blur),
        A.Normalize(VIEW.mean, VIEW.std),
    ])  # fmt: skip
    return lambda: [chain(image=crop)["image"] for crop in crops]


def ours(backend: str) -> Callable[[np.ndarray], Form]:
    def form(crops: np.ndarray) -> Form:
        epoch = iter(range(1 << 31))
        indices, sizes, batch = np.arange(len(crops)), np.full(len(crops), SIDE), torch.from_numpy(crops)

        def run() -> torch.Tensor:
            table = draw_parameters(VIEW, 0, next(epoch), indices, sizes, sizes)[:, 0]
            return augment(batch, torch.from_numpy(table), VIEW, backend)

        return run

    return form


FORMS: dict[str, Callable[[np.ndarray], Form]] = {
    "torchvision-pil": torchvision_pil,
    "pillow-blur": pillow_blur,
    "torchvision-tensor": torchvision_tensor,
    "kornia": kornia,
    "albumentations": albumentations,
    "reference": ours("reference"),
    "numba": ours("numba"),
}


# The whole path, from the file to the batch


def path_speeds(data: str, workers: int, epochs: int) -> list[dict[str, Any]]:
    """Images per second (two views each) over whole epochs, from cached files; forms alternate."""
    from pipelines.convert.conversion import ConvertOptions, Settings, convert

    with tempfile.TemporaryDirectory() as folder:
        beton, files = Path(folder) / "images.beton", Path(folder) / "files"
        convert(data, beton, Settings(max_resolution=400), options=ConvertOptions(workers=workers))
        write_jpegs(beton, files)
        paths = {
            "ours": our_path(beton, workers),
            "torchvision": torchvision_path(files, workers),
            "pillow-blur": torchvision_path(files, workers, PillowBlur(VIEW.sigma)),
        }
        found: dict[str, list[float]] = {name: [] for name in paths}
        for path in paths.values():
            path()  # warm-up: compiles, and loads the files into the page cache
        for _ in range(epochs):
            for name, path in paths.items():
                found[name].append(path())
    return [
        {"what": "path", "form": name, "processes": workers, **summary(found[name], "images_per_second")}
        for name in paths
    ]


PATH_BATCH = 64


def write_jpegs(beton: Path, folder: Path) -> None:
    """Write the beton's own JPEGs as files, all in one class folder."""
    from pipelines.decode.beton import BetonReader
    from pipelines.formats.beton import JPEG

    source = BetonReader(beton)
    if len(source) < PATH_BATCH or not (source.file.modes == JPEG).all():
        raise InputError(f"--data: at least {PATH_BATCH} images, all of which a beton stores as JPEGs")
    (folder / "all").mkdir(parents=True)
    for n in range(len(source)):
        (folder / "all" / f"{n:06d}.jpg").write_bytes(bytes(source.encoded(0, n)))


def our_path(beton: Path, workers: int) -> Callable[[], float]:
    from pipelines.decode import open_reader
    from pipelines.loader import LoaderSettings, TwoViewLoader

    source = open_reader(beton)
    loader = TwoViewLoader(source, VIEW, LoaderSettings(PATH_BATCH, workers=workers))
    return lambda: timed(loader, lambda batch: batch.views.shape[:2] == (2, PATH_BATCH))


def torchvision_path(files: Path, workers: int, blur: Any = None) -> Callable[[], float]:
    from torchvision.datasets import ImageFolder

    chain = torchvision_chain(VIEW, T.PILToTensor(), blur=blur)
    crop = T.RandomResizedCrop(SIDE, VIEW.scale, VIEW.ratio, antialias=True)
    dataset = ImageFolder(str(files), lambda image: (chain(crop(image)), chain(crop(image))))
    loader = torch.utils.data.DataLoader(
        dataset, PATH_BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True,
        worker_init_fn=one_thread,
    )  # fmt: skip
    return lambda: timed(loader, lambda batch: batch[0][0].shape == (PATH_BATCH, 3, SIDE, SIDE))


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def timed(loader: Any, right: Callable[[Any], bool]) -> float:
    """Images per second of an epoch, timed from the first request: nothing made in advance is free."""
    started, count = time.perf_counter(), 0
    for batch in loader:
        assert right(batch)
        count += 1
    return count * PATH_BATCH / (time.perf_counter() - started)


# Fidelity

OPERATIONS: dict[str, tuple[int, tuple[float, ...], Callable[[torch.Tensor, float], torch.Tensor]]] = {
    "flip": (columns.FLIP, (1,), lambda x, _: tv.horizontal_flip(x)),
    "brightness": (columns.BRIGHTNESS, (0.2, 0.7, 1.3, 1.8), tv.adjust_brightness),
    "contrast": (columns.CONTRAST, (0.2, 0.7, 1.3, 1.8), tv.adjust_contrast),
    "saturation": (columns.SATURATION, (0.2, 0.7, 1.3, 1.8), tv.adjust_saturation),
    "hue": (columns.HUE, (-0.2, -0.1, 0.05, 0.1, 0.2), tv.adjust_hue),
    "grey": (columns.GREY, (1,), lambda x, _: tv.rgb_to_grayscale(x, 3)),
    "blur": (columns.SIGMA, (0.1, 0.5, 1.0, 2.0),
             lambda x, s: tv.gaussian_blur(x, [VIEW.kernel_size] * 2, [s] * 2)),
    "solarise": (
        columns.SOLARISE, (1,), lambda x, _: tv.solarize(x, 128 / 255 if x.is_floating_point() else 128)
    ),
}  # fmt: skip


def errors(count: int = 16) -> dict[str, dict[str, dict[str, float]]]:
    """Errors of the numba form, in levels: operation -> peer -> mean (of the worst channel), max, bias (ours
    minus theirs) and the share of values that differ by more than 3 levels."""
    crops = photographs(count, seed=1)
    plain = ViewSettings(mean=(0, 0, 0), std=(1, 1, 1))
    images = torch.from_numpy(crops).permute(0, 3, 1, 2)
    cases: dict[str, list[tuple[np.ndarray, Callable[[torch.Tensor], torch.Tensor]]]] = {}
    for name, (column, values, operation) in OPERATIONS.items():
        for value in values:
            table = identity(count)
            table[:, column] = value
            cases.setdefault(name, []).append((table, lambda x, f=operation, v=value: f(x, v)))  # type: ignore[misc]
    sizes = np.full(4 * count, SIDE)
    drawn = draw_parameters(plain, 5, 0, np.arange(4 * count), sizes, sizes)
    for k in range(4):
        table = np.ascontiguousarray(drawn[k * count : (k + 1) * count, 0])
        cases.setdefault("chain", []).append((table, lambda x, t=table: functional_chain(x, t)))  # type: ignore[misc]
    result = {}
    for name, of_name in cases.items():
        differences: dict[str, list[torch.Tensor]] = {"float": [], "uint8": []}
        for table, theirs in of_name:
            exact = theirs(images.float() / 255) * 255
            out = np.empty(crops.shape, np.float32)
            cpu.augment_into(crops, table, plain, out)
            got = torch.from_numpy(out).permute(0, 3, 1, 2) * 255
            differences["float"].append(got - exact)
            differences["uint8"].append(got - theirs(images).float())
        result[name] = {
            against: {
                "mean": max(found.abs().mean((0, 2, 3)).tolist()),
                "max": found.abs().max().item(),
                "bias": found.mean().item(),
                "share_above_3": (found.abs() > 3).float().mean().item(),
            }
            for against, parts in differences.items()
            for found in [torch.cat(parts)]
        }
    return result


def identity(count: int) -> np.ndarray:
    """Parameters that leave every image unchanged."""
    table = np.zeros((count, P), np.float32)
    table[:, [columns.BRIGHTNESS, columns.CONTRAST, columns.SATURATION]] = 1
    return table


def functional_chain(images: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    """Apply torchvision's operations one after the other to float or uint8 [N, 3, R, R]."""
    jitter = ("brightness", "contrast", "saturation", "hue")
    done = []
    for image, row in zip(images, table):
        steps = [jitter[k] for k in reference.ORDERS[int(row[columns.ORDER])]]
        for name in ("flip", *steps, "grey", "blur", "solarise"):
            column, _, operation = OPERATIONS[name]
            value = float(row[column])
            if value != (1 if name in jitter[:3] else 0):
                image = operation(image, value)
        done.append(image)
    return torch.stack(done)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Our speed over theirs: the median over rounds, so that drift of the machine cancels out. Forms that
    weren't run are left out, and there is no fastest peer unless all of them ran."""
    each = {(row["what"], row["form"]): row["each"] for row in rows}

    def over(what: str, mine: str, theirs: str) -> float:
        return statistics.median(a / b for a, b in zip(each[what, mine], each[what, theirs]))

    found = {}
    if ("views", "numba") in each:
        peers = {name: over("views", "numba", name) for name in PEERS if ("views", name) in each}
        named = {"torchvision": "torchvision-pil", "pillow_blur": "pillow-blur", "kornia": "kornia"}
        found = {f"views_over_{name}": peers[form] for name, form in named.items() if form in peers}
        if len(peers) == len(PEERS):
            found["views_over_fastest_peer"] = min(peers.values())
    if ("path", "ours") in each:
        found["path_over_torchvision"] = over("path", "ours", "torchvision")
        found["path_over_pillow_blur"] = over("path", "ours", "pillow-blur")
    return found


def show(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        speed = row.get("views_per_second") or row["images_per_second"]
        low, high = row["quartiles"]
        print(f"{row['what']:7}{row['form']:24}{speed:8.1f} a second ({low:.1f} to {high:.1f})")
    for form, why in result["absent"].items():
        print(f"{form:31}absent: {why}")
    for name, ratio in result["ratios"].items():
        print(f"{name:32}{ratio:6.1f}")
    print(f"\n{'levels of 1/255: mean, max':28}{'float':>16}{'uint8':>16}")
    for name, against in result["errors"].items():
        cells = (against[key] for key in ("float", "uint8"))
        text = (f"{c['mean']:8.3f}{c['max']:8.2f}" for c in cells)
        print(f"{name:28}" + "".join(text))
    chain = result["errors"]["chain"]["uint8"]
    print(
        f"chain, uint8: bias {chain['bias']:.2f}, {100 * chain['share_above_3']:.1f} % more than 3 levels off"
    )


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
