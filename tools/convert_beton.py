"""Turn an image data set into a beton, FFCV's file, with a manifest beside it.

    convert-beton photos/ photos.beton                                 # photos/CLASS/IMAGE.jpg
    convert-beton imagenet/ val.beton --split validation               # imagenet/val/CLASS/IMAGE.JPEG
    convert-beton cifar10-jpeg/ test.beton --split test                # Hugging Face image parquet
    convert-beton /usr/share/datasets/fashion-mnist train.beton        # MNIST's idx files
    convert-beton torchvision:CIFAR10 train.beton --root data          # downloaded if need be
    convert-beton sklearn:digits digits.beton                          # always at hand

A JPEG is checked by decoding it, and stored byte for byte. Only what must change is encoded anew: JPEGs
that are larger than --max-resolution, CMYK or turned by EXIF; and PNG and the like, unless they are so
small (64 x 64) that raw pixels serve better. Damaged files are left out and named in OUT.beton.json.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any, NoReturn

from pipelines.convert.conversion import Settings, convert
from pipelines.convert.readers import SPLITS
from pipelines.errors import InputError

WARNINGS_SHOWN = 20


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see convert-beton --help)\n")


def parser() -> argparse.ArgumentParser:
    p = _Parser("convert-beton", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("source", metavar="SOURCE", help="a folder, a .parquet, torchvision:NAME or sklearn:digits")
    add("out", metavar="OUT.beton", help="the file to write; its manifest is OUT.beton.json")
    add("--split", choices=SPLITS, help="which part of a source that has parts (default: train)")
    add("--subset", type=int, metavar="N", help="only N images, as many of each class as can be")
    add("--shuffle-seed", type=int, metavar="S", help="an order drawn from S (default: the source's order)")
    add("--max-resolution", type=int, metavar="N", help="shrink images whose longest side is over N pixels")
    add("--jpeg-quality", type=int, default=90, metavar="Q", help="of what is encoded, 1-100 (default: 90)")
    add("--raw", action="store_true", help="store RGB pixels of everything: large, but nothing to decode")
    add(
        "--on-error",
        choices=("refuse", "fail"),
        default="refuse",
        help="a damaged file is left out and named in the manifest (refuse, the default), or ends all (fail)",
    )
    add("--root", default="data", metavar="DIR", help="where torchvision keeps its files (default: data)")
    add("--workers", type=int, metavar="N", help="threads (default: one a core); the bytes are the same")
    add("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    return p


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 0, 2 after an error of the user's, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    settings = Settings(
        max_resolution=args.max_resolution,
        jpeg_quality=args.jpeg_quality,
        raw=args.raw,
        subset=args.subset,
        shuffle_seed=args.shuffle_seed,
        on_error=args.on_error,
    )
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the unfinished file
    try:
        manifest = convert(
            args.source,
            args.out,
            settings,
            split=args.split,
            root=args.root,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=True,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    _report(args.out, manifest)
    return 0


def _report(out: str, manifest: dict[str, Any]) -> None:
    refused = manifest["refused"]
    for note in manifest["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    for each in refused[:WARNINGS_SHOWN]:
        print(f"warning: refused {each['name']}: {each['reason']}", file=sys.stderr)
    if len(refused) > WARNINGS_SHOWN:
        print(f"warning: {len(refused) - WARNINGS_SHOWN} more refused, named in {out}.json", file=sys.stderr)
    words = {"jpeg_untouched": "JPEG as they were", "turned_upright": "turned upright"}
    stored = [f"{n:,} {words.get(how, how)}" for how, n in manifest["stored"].items() if n]
    rate = manifest["count"] / manifest["seconds"]
    print(
        f"{out}: {manifest['count']:,} images ({', '.join(stored)}) in {len(manifest['classes'])} classes, "
        f"{len(refused)} refused, {manifest['bytes'] / 1e6:,.1f} MB in {manifest['seconds']:.1f} s "
        f"({rate:,.0f} img/s); manifest {out}.json"
    )


if __name__ == "__main__":
    sys.exit(main())
