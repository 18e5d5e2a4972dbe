"""A demonstration of everything on real images, in minutes: convert, pretrain, evaluate, report."""

import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvssl.codes.file import open_codes
from lvssl.evaluation.analyse import analyse
from lvssl.evaluation.codes import encode
from lvssl.evaluation.evaluate import evaluate, print_table
from lvssl.report.page import conclusion, write_report
from lvssl.settings.apply import EncodeSettings
from lvssl.settings.fields import shell_line
from lvssl.settings.measure import AnalyseSettings, EvaluateSettings
from lvssl.settings.pretrain import PretrainSettings, preset
from lvssl.settings.start import DemoSettings
from lvssl.training.pretrain import pretrain
from pipelines.convert.conversion import ConvertOptions, convert
from pipelines.convert.conversion import Settings as ConvertSettings
from pipelines.decode import open_reader
from pipelines.errors import InputError
from pipelines.loader import evaluation_crops

# The Debian package dataset-fashion-mnist, installed, or unpacked into the checkout by tools/install.sh.
FASHION_MNIST = (
    Path("/usr/share/datasets/fashion-mnist"),
    Path(__file__).resolve().parents[2] / "data/fashion-mnist",
)
ANALYSED = 500  # test images; gives rough figures in a minute on one core
PICTURES = 200  # test images written as files, for encode and search


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Write runs, betons, codes and report.html to the folder `out`; return the result of `evaluate`."""
    started = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    name, train, test = converted(settings)
    runs = {
        family: settings.out / label for family, label in (("none", "control"), ("bernoulli", "bernoulli"))
    }
    for family, folder in runs.items():
        print(f"\n== pretraining {folder.name} (family {family})", flush=True)
        pretrain(arm(settings, name, family, train, folder), resume=True)
    print("\n== evaluating", flush=True)
    run, control = runs["bernoulli"], runs["none"]
    evaluation = evaluate(EvaluateSettings(run, test=test, control=control, overwrite=True))
    print("\n== analysing uncertainty and single bits", flush=True)
    analysis = analyse(AnalyseSettings(run, test=test, control=control, max_images=ANALYSED, overwrite=True))
    codes = encode(EncodeSettings(run=runs["bernoulli"], images=pictures(settings.out / "images", test)))
    page = settings.out / "report.html"
    shutil.copyfile(write_report(runs["bernoulli"]), page)

    print()
    print_table(evaluation["rows"])
    measured = {"evaluate": evaluation, "analyse": analysis, "compression": {}}
    print("", *conclusion(measured), sep="\n")
    query = sorted((settings.out / "images").iterdir())[0]
    opened = open_codes(codes)
    print(f"\ncodes    {codes}: {opened.count} images, {opened.bits // 8} bytes each")
    lvssl = "lvssl" if shutil.which("lvssl") else str(Path(sys.executable).with_name("lvssl"))
    print("search  ", shell_line(lvssl, "search", run, "--query", query))
    print(f"results  {run / 'evaluation.json'}")
    print(f"page     {page.resolve()}")
    more = [shell_line(lvssl, stage, run) for stage in ("compression", "report")]
    print(f"more     {'; '.join(more)}")
    print(f"({time.monotonic() - started:.0f} s)")
    return evaluation


def converted(settings: DemoSettings) -> tuple[str, Path, Path]:
    """Return (preset, train.beton, test.beton) after converting them, if necessary."""
    choices = ("auto", "fashion-mnist", "digits")
    if settings.data not in choices:
        raise InputError(f"unknown --data {settings.data!r}; known: {', '.join(choices)}")
    name = "digits" if settings.data == "digits" else "fashion-mnist"
    try:
        return name, *both_splits(settings, name)
    except InputError as error:
        if settings.data != "auto":
            raise
        print(
            f"Fashion-MNIST isn't available here ({error}).\nUsing scikit-learn's digits instead.", flush=True
        )
    return "digits", *both_splits(settings, "digits")


def both_splits(settings: DemoSettings, name: str) -> tuple[Path, Path]:
    folder = settings.out / "data" / name
    train, test = (convert_split(settings, name, s, folder / f"{s}.beton") for s in ("train", "test"))
    return train, test


def convert_split(settings: DemoSettings, name: str, split: str, out: Path) -> Path:
    if out.exists():
        return out
    if name == "digits":
        source, subset = "sklearn:digits", None
    else:
        source = fashion_mnist()
        subset = settings.max_images if split == "train" else None
    print(f"== converting {source} ({split})", flush=True)
    convert(
        source,
        out,
        ConvertSettings(subset=subset),
        options=ConvertOptions(split=split, root=settings.out / "downloads", progress=True),
    )
    return out


def fashion_mnist() -> str:
    """Return the source for `convert-beton`: Debian's files if they exist, else torchvision's download."""
    return next((str(folder) for folder in FASHION_MNIST if folder.is_dir()), "torchvision:FashionMNIST")


def arm(settings: DemoSettings, name: str, family: str, data: Path, folder: Path) -> PretrainSettings:
    chosen = preset(name)
    return dataclasses.replace(
        chosen,
        data=data,
        out=folder,
        seed=settings.seed,
        epochs=settings.epochs or chosen.epochs,
        latent=dataclasses.replace(chosen.latent, family=family),
    )


def pictures(folder: Path, test: Path) -> Path:
    """Write some test images as PNG files, named by position and class."""
    folder.mkdir(exist_ok=True)
    source = open_reader(test)
    for index in np.arange(min(PICTURES, len(source))):
        side = int(source.sizes(np.array([index]))[0][0])
        view = dataclasses.replace(preset("fashion-mnist").view, resolution=side)
        pixels = evaluation_crops(source, view, np.array([index]))[0]
        Image.fromarray(pixels).save(folder / f"{index:04d}-class{source.labels[index]}.png")
    return folder
