"""Are real-world images read as Pillow reads them? Passes some 4,400 files through converter and loader.

    make test-images                                  # python -m benchmarks.real_images

Pillow's own test images (from its source package: every format, and files that once crashed a decoder),
Debian's opencv-doc and tuxpaint are fetched into --folder once (some 310 MB), unpacked, and put into one
tree, with a class for each. It uses files that Pillow identifies or that have an image's name or first bytes,
without duplicates.

`convert-beton` runs on the tree, then the loader on the tree and on the beton. The exit status is 1, with the
names of the files, unless

- neither ends early, prints a library's raw message, or refuses what the other accepts;
- every image that Pillow reads and we refuse is refused by one of RULES;
- for images stored unchanged (JPEG) or without loss, pixels differ from Pillow's by at most one level, in the
  mean over an image. Pillow clips samples of more than 8 bits, so ours are compared with a straight line
  fitted through its own.

The output is also written to the page --out, docs/real-images.md.
"""

import hashlib
import io
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

from benchmarks.script import parser_of
from lvssl.commands.main import guarded
from pipelines.datasets.recognise import HEAD, has_image_name, is_image
from pipelines.decode import Reader, open_reader
from pipelines.decode.beton import BetonReader
from pipelines.decode.images import ImageReader
from pipelines.decode.pixels import decode_rgb
from pipelines.errors import InputError
from pipelines.files import write_atomically
from pipelines.formats.manifest import read_manifest
from pipelines.loader import LoaderSettings, Replacements, TwoViewLoader, evaluation_batches
from pipelines.views import ViewSettings

PILLOW = "12.3.0"
# For each collection: the package that is unpacked, and the folder of its images.
SOURCES = {
    "Pillow's tests": ([f"pillow-{PILLOW}"], f"pillow-{PILLOW}/Tests/images"),
    "opencv-doc": (["opencv-doc"], "usr/share/doc/opencv-doc"),
    "tuxpaint": (["tuxpaint", "tuxpaint-data", "tuxpaint-stamps-default"], "usr/share/tuxpaint"),
}
# Reasons for refusing images that Pillow reads: the reason's start or a part of it, and the rule.
RULES = {
    "white unknown": (
        "doesn't say which value is white|no known range",
        "more than 8 bits a sample, and the file doesn't say which value is white: `--white-level N`",
    ),
    "damaged JPEG": (
        "^Corrupt JPEG data|^Premature end of JPEG|^Unsupported marker|^Invalid SOS",
        "libjpeg-turbo warns of damage, such as extraneous bytes: `--on-error keep`",
    ),
    "too large": ("--max-pixels", "more than 268,435,456 pixels: `--max-pixels N`"),
}
LARGEST_DIFFERENCE = 1.0  # in levels of 255, for the mean over an image
MEMORY = 14 << 30  # bytes of address space for converter and loader
VIEW = ViewSettings(resolution=32, blur=0.0)


def main(arguments: list[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("data/real-images"), help="where they are kept")
    parser.add_argument("--out", type=Path, help="the page to write")
    options = parser.parse_args(arguments)
    tree = gather(options.folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    beton = options.folder / "images.beton"
    faults = convert(tree, beton)
    files = compared(tree, beton)
    faults += [f"{file.name}: {fault}" for file in files if (fault := file.fault())]
    faults += loaded(tree, beton, {file.name for file in files if file.refused})
    text = page(files, recognised(tree))
    print(text)
    if options.out:
        write_atomically(options.out, text.encode())
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


# ------------------------------------------------------------------- the images


def gather(folder: Path) -> Path:
    """The tree of images, fetched and made if it doesn't exist: a folder for each collection."""
    tree = folder / "images"
    if tree.is_dir():
        return tree
    making = folder / "images.part"
    shutil.rmtree(making, ignore_errors=True)
    seen: set[bytes] = set()
    for name, (packages, below) in SOURCES.items():
        unpacked = folder / "unpacked" / name
        for package in packages:
            unpack(package, unpacked, folder)
        for path in sorted(path for path in (unpacked / below).rglob("*") if is_meant(path)):
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest not in seen:
                to = making / name / path.relative_to(unpacked / below)
                to.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, to)
            seen.add(digest)
    making.rename(tree)
    return tree


def unpack(package: str, to: Path, folder: Path) -> None:
    """Fetch a package, unless that was done before, and unpack it. Raises InputError."""
    to.mkdir(parents=True, exist_ok=True)
    is_debian = not package.startswith("pillow")
    pattern = f"{package}_*.deb" if is_debian else f"{package}.tar.gz"
    if not list(folder.glob(pattern)):
        print(f"fetching {package}", file=sys.stderr)
        fetch = ["apt-get", "download", package]
        if not is_debian:
            pip = "-m pip download --quiet --no-deps --no-binary :all:"
            fetch = [sys.executable, *pip.split(), package.replace("-", "==")]
        done = subprocess.run(fetch, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            why = " ".join(done.stderr.strip().splitlines()[-1:])
            raise InputError(f"{package}: cannot be fetched ({why}); this needs Debian and a network")
    file = next(folder.glob(pattern))
    if is_debian:
        subprocess.run(["dpkg-deb", "-x", str(file), str(to)], check=True)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(to, filter="data")


def is_meant(path: Path) -> bool:
    """Whether a file is an image, by Pillow or by its name or first bytes."""
    if not path.is_file() or path.is_symlink():
        return False
    with open(path, "rb") as file:
        if has_image_name(path.name) or is_image(file.read(HEAD)):
            return True
    try:
        Image.open(io.BytesIO(path.read_bytes()))
        return True
    except Exception:
        return False


# -------------------------------------------------------------- converter, loader


def convert(tree: Path, beton: Path) -> list[str]:
    """Run the converter; returns its faults."""
    command = [sys.executable, "-m", "pipelines.convert.command", str(tree), str(beton), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise InputError(f"convert-beton ended with status {done.returncode}: {done.stderr[-2000:]}")
    print(done.stdout.strip().replace(f"{tree.parent}/", ""), file=sys.stderr)
    known = ("warning: skipped ", "note: ", "estimate: ")
    lines = [line for line in re.split("[\r\n]", done.stderr) if line.strip() and "img/s]" not in line]
    raw = [line for line in lines if not line.startswith(known) and "Warning" in line]
    return [f"convert-beton says: {line}" for line in raw]


def loaded(tree: Path, beton: Path, refused: set[str]) -> list[str]:
    """Read every image with the loader, from the tree and from the beton; returns faults, such as an image
    that it refuses and the converter accepts, or the reverse."""
    faults = []
    for path in (tree, beton):
        source = open_reader(path)
        replacements = Replacements(source, "skip")
        count = sum(len(rows) for _, rows in evaluation_batches(source, VIEW, replacements=replacements))
        names = names_of(source)
        found = {names[index] for index in replacements.damaged}
        wanted = refused if path == tree else set()
        faults += [f"{name}: the loader refuses it, the converter doesn't" for name in found - wanted]
        faults += [f"{name}: the converter refuses it, the loader doesn't" for name in wanted - found]
        with TwoViewLoader(source, VIEW, LoaderSettings(64, on_error="skip")) as loader:
            views = sum(len(batch.views[0]) for batch in loader)
        print(f"loader: {count:,} images of {path.name}, {views:,} in two views", file=sys.stderr)
    return faults


def names_of(source: Reader) -> list[str]:
    if isinstance(source, ImageReader):
        return list(source.names)
    return [str(i) for i in range(len(source))]


def recognised(tree: Path) -> Counter[str]:
    """For each collection, the number of files that a folder without classes leaves out, as neither their
    names nor their first bytes are an image's."""
    source = ImageReader(tree, labelled=False)
    found = set(source.names)
    everything = [path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()]
    return Counter(name.partition("/")[0] for name in everything if name not in found)


# ---------------------------------------------------------------------- compared


@dataclass
class File:
    """One image, as read by Pillow, the converter and our loader."""

    name: str
    pillow: bool  # whether Pillow reads it
    refused: str = ""  # the converter's reason
    stored: str = ""  # storage kind in the manifest
    difference: float = 0.0  # from Pillow, in levels, of the file's or the stored pixels: the larger

    @property
    def collection(self) -> str:
        return self.name.partition("/")[0]

    @property
    def rule(self) -> str:
        return next((rule for rule, (text, _) in RULES.items() if re.search(text, self.refused)), "")

    @property
    def lossless(self) -> bool:
        return self.stored in ("jpeg_untouched", "raw")

    def fault(self) -> str:
        """What is wrong with it, or an empty string."""
        if self.refused:
            return f"refused by no rule ({self.refused})" if self.pillow and not self.rule else ""
        if self.pillow and self.lossless and not self.difference <= LARGEST_DIFFERENCE:
            return f"differs from Pillow by {self.difference:.2f} levels ({self.stored})"
        return ""


def compared(tree: Path, beton: Path) -> list[File]:
    """Compare every file of the tree."""
    manifest, rows = read_manifest(beton.with_name(beton.name + ".json"))
    refused = {each["name"]: each["reason"] for each in manifest["refused"]}
    files = [File(name, by_pillow(tree / name) is not None, reason) for name, reason in refused.items()]
    source = BetonReader(beton)
    for index, name in enumerate(rows["name"]):
        stored = source.encoded(0, index)
        pixels = decode_rgb(stored) if isinstance(stored, bytes) else stored
        wanted = by_pillow(tree / name)
        file = File(name, wanted is not None, stored=rows["stored"][index])
        if wanted is not None:
            file.difference = max(difference(wanted, p) for p in (pixels, decode_rgb(tree / name)))
        files.append(file)
    return files


def by_pillow(path: Path) -> np.ndarray | None:
    """Pillow's pixels of a file, upright: [H, W, 3], or samples of more than 8 bits [H, W]; None if it can't
    read it."""
    try:
        image: Image.Image = Image.open(io.BytesIO(path.read_bytes()))  # by name, it would first try others
        image.load()
        deep = image.mode.startswith("I") or image.mode == "F"
        image = image if deep else image.convert("RGB")
    except Exception:
        return None
    with suppress(Exception):  # a broken EXIF block
        image = ImageOps.exif_transpose(image)
    return np.asarray(image)


def difference(pillow: np.ndarray, ours: np.ndarray) -> float:
    """Mean absolute difference in levels; infinite if sizes differ. Deep samples are compared with the
    straight line that fits best through both."""
    if pillow.shape[:2] != ours.shape[:2]:
        return float("inf")
    if pillow.ndim == 3:
        return float(np.abs(pillow.astype(np.int16) - ours).mean())
    samples, grey = pillow.astype(np.float64).ravel(), ours[..., 0].astype(np.float64).ravel()
    spread = samples.std()
    slope = np.mean((samples - samples.mean()) * (grey - grey.mean())) / spread**2 if spread else 0.0
    return float(np.abs(grey - grey.mean() - slope * (samples - samples.mean())).mean())


# ------------------------------------------------------------------------- page

PAGE = """\
# Other people's images

This page shows which images from other sources lvssl can read, and how the results differ from Pillow's.
`make test-images` runs the converter and the loader on the test images of Pillow {version} (every format, and
files that once crashed a decoder) and on Debian's `opencv-doc` and `tuxpaint`. It wrote this page, with
Pillow {here}.

| | {heads} | together |
| --- | {rules}---: |
{table}

A *kept* JPEG is stored byte for byte, and *raw* pixels are stored without loss. Images in other formats, or
rotated by EXIF, are *re-encoded* at quality 90. Differences are means over an image, out of 255 levels.

An image that Pillow can read is refused only by these rules, each with the option that accepts it:

{listed}

In a folder without class folders, a file counts as an image by its extension or its first bytes. {left} of
these files, in rare formats, are recognised by neither; `convert-beton` counts and names what it leaves out.
"""


def page(files: list[File], left: Counter[str]) -> str:
    columns = [[file for file in files if file.collection == name] for name in SOURCES] + [files]

    def row(title: str, cell) -> str:
        return f"| {title} | {' | '.join(str(cell(column)) for column in columns)} |"

    def count(title: str, chosen) -> str:
        return row(title, lambda column: f"{sum(1 for file in column if chosen(file)):,}")

    def differences(title: str, kind: str) -> str:
        def cell(column: list[File]) -> str:
            found = [file.difference for file in column if file.pillow and file.stored == kind]
            return f"{np.median(found):.2f}; {max(found):.2f}" if found else ""

        return row(title, cell)

    table = [
        count("files", lambda f: True),
        count("read by Pillow", lambda f: f.pillow),
        count("converted", lambda f: not f.refused),
        count("of these, JPEGs kept", lambda f: f.stored == "jpeg_untouched"),
        count("of these, raw", lambda f: f.stored == "raw"),
        count("of these, re-encoded", lambda f: f.stored == "reencoded"),
        count("read by lvssl, not by Pillow", lambda f: not f.refused and not f.pillow),
        count("refused by both", lambda f: f.refused and not f.pillow),
        *(
            count(f"refused, but read by Pillow: {rule}", lambda f, r=rule: f.pillow and f.rule == r)
            for rule in RULES
        ),
        count(
            "refused, but read by Pillow: other reasons",
            lambda f: f.pillow and bool(f.refused) and not f.rule,
        ),
        differences("difference, kept JPEGs: median; largest", "jpeg_untouched"),
        differences("difference, raw pixels: median; largest", "raw"),
        differences("difference, re-encoded: median; largest", "reencoded"),
    ]
    return PAGE.format(
        version=PILLOW,
        here=PIL.__version__,
        heads=" | ".join(SOURCES),
        rules="---: | " * len(SOURCES),
        table="\n".join(table),
        listed="\n".join(f"- *{rule}*: {text}" for rule, (_, text) in RULES.items()),
        left=f"{left.total():,}",
    )


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
