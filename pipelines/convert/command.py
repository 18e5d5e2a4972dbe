"""Turn an image data set into a beton (FFCV), into WebDataset tars (DALI, webdataset), or both in one pass.

    convert-beton photos/ photos.beton                                 # photos/CLASS/IMAGE.jpg
    convert-beton ILSVRC2012_img_train.tar train.beton                 # ImageNet as it is downloaded
    convert-beton ILSVRC2012_img_val.tar val.beton --devkit ILSVRC2012_devkit_t12.tar.gz
    convert-beton imagenet/ val.beton --split validation               # imagenet/val/CLASS/IMAGE.JPEG
    convert-beton imagenet/ train.beton --webdataset train-tars/       # both from one pass
    convert-beton 'train-{000000..000146}.tar' train.beton             # WebDataset shards
    convert-beton cifar10-jpeg/ test.beton --split test                # Hugging Face image parquet
    convert-beton photos/ photos.beton                                 # loose images: no labels, to pretrain
    convert-beton table.csv out.beton                                  # columns path and label
    convert-beton ages.csv ages.beton --targets age                    # path,age: regression
    convert-beton /usr/share/datasets/fashion-mnist train.beton        # MNIST's idx files
    convert-beton torchvision:CIFAR10 train.beton --root data          # downloaded if need be
    convert-beton sklearn:digits digits.beton                          # always at hand

    convert-beton imagenet/ train.beton --shard 3/8                    # the third job of an array of eight
    convert-beton --merge train.beton                                  # when all eight are done
    convert-beton --verify train.beton                                 # every byte and every image again
    convert-beton --inspect train.beton                                # counts, sizes, a sheet of images

Each JPEG is checked by decoding it and stored byte for byte. Images are encoded anew only where they must
change: JPEGs that are larger than --max-resolution, that are CMYK or that EXIF says are rotated; and other
formats (PNG and so on), unless they are so small (64 x 64), or so much smaller without loss (line art), that
raw pixels serve better. Damaged images are skipped and named in OUT.beton.json. An interrupted conversion
resumes when the same command is run again, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from pipelines.amounts import size_text
from pipelines.convert.conversion import ConvertOptions, OutputOptions, Settings, convert, part_path
from pipelines.convert.store import LINE_ART
from pipelines.datasets.opening import SPLITS
from pipelines.datasets.parts import unquoted
from pipelines.errors import ON_ERROR, InputError, hide_decoders_warnings, in_words
from pipelines.formats import jpeg, turbojpeg
from pipelines.formats.webdataset import IMAGES_PER_TAR

WARNINGS_SHOWN = 20
Options = TypeVar("Options", bound=OutputOptions)


class _Parser(argparse.ArgumentParser):
    """Print errors in one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see convert-beton --help)\n")


def parser() -> argparse.ArgumentParser:
    p = _Parser("convert-beton", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="The images: a folder, .tar, .parquet, .csv, .jsonl, .beton or torchvision:NAME.",
    )
    p.add_argument(
        "out", metavar="OUT.beton", nargs="?", help="The file to write. Its manifest is OUT.beton.json."
    )
    _source_options(p.add_argument_group("what is read"))
    _stored_options(p.add_argument_group("what is stored"))
    _run_options(p.add_argument_group("how it runs"))
    _other_tasks(p.add_argument_group("instead of a conversion"))
    return p


def _source_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--split", choices=SPLITS, help="Which part of the source to read, if it has parts (default: train).")
    add(
        "--classes",
        metavar="FILE",
        help="Number the classes in the order of this manifest, or of this text file with a name a line.",
    )
    add(
        "--devkit",
        metavar="FILE",
        help="ImageNet's development kit, which its validation tar needs (default: the one beside the tar).",
    )
    add(
        *("--image-column", "--image-key"),
        metavar="NAME",
        help="The column of the images or of their paths, where it has no usual name; in a tar of several "
        "images a sample, what comes after its key (left.jpg).",
    )
    add(
        *("--label-column", "--label-key"),
        metavar="NAME",
        help="The column of the classes, where it has no usual name; in a tar an extension or a field of the "
        ".json. With `none`, labels are not read.",
    )
    add(
        "--targets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Columns of numbers, in a tar fields of the .json, to store as regression targets.",
    )
    add("--root", default="data", metavar="DIR", help="Where torchvision keeps its files (default: data).")
    add(
        "--only-classes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Read only the images of these classes (default: of all). Classes keep their numbers.",
    )
    add("--subset", type=int, metavar="N", help="Read only N images, balanced over the classes.")
    add(
        "--shuffle-seed",
        type=int,
        metavar="S",
        help="Store the images in an order drawn from this seed (default: in the order of the source).",
    )
    add("--shard", type=_shard, metavar="K/N", help="Convert the K-th of N parts, K from 1. See --merge.")


def _stored_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--webdataset", metavar="DIR", help="Write tars with wds2idx's indices into this new folder.")
    add(
        "--images-per-tar",
        type=int,
        default=IMAGES_PER_TAR,
        metavar="N",
        help=f"How many images a tar holds (default: {IMAGES_PER_TAR}).",
    )
    add(
        "--max-resolution",
        type=int,
        metavar="N",
        help="Shrink images whose longest side is over N pixels.",
    )
    add(
        "--max-pixels",
        type=int,
        default=jpeg.MAX_PIXELS,
        metavar="N",
        help=f"Skip images of more than N pixels (default: {jpeg.MAX_PIXELS}).",
    )
    add(
        "--jpeg-quality",
        type=int,
        default=90,
        metavar="Q",
        help="Quality of the images that are encoded anew, 1 to 100 (default: 90).",
    )
    add(
        "--jpeg-sampling",
        choices=list(turbojpeg.SAMPLINGS),
        default="4:2:0",
        help="Colour resolution of the images that are encoded anew: 4:4:4 keeps thin coloured lines better, "
        "takes half as much room again and decodes more slowly (default: 4:2:0).",
    )
    add(
        "--line-art",
        choices=LINE_ART,
        default="raw",
        help="Images whose PNG, GIF, BMP or lossless WebP file is smaller than a JPEG of them: store RGB "
        "pixels, which is exact and large, or that JPEG (default: raw).",
    )
    add(
        "--raw-proportion",
        type=float,
        default=0.0,
        metavar="P",
        help="Proportion of the images to store as RGB pixels, 0 to 1. These are large, but need no decoding "
        "(default: 0).",
    )
    add(
        "--white-level",
        type=int,
        metavar="N",
        help="The value of white in images of more than 8 bits that do not state it (4095 for 12 bits).",
    )


def _run_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--on-error",
        choices=ON_ERROR,
        default="skip",
        help="What to do about a damaged image: skip it and name it in the manifest, raise an error and "
        "stop, or keep what Pillow makes of a JPEG in which libjpeg-turbo finds damage (default: skip).",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="Number of threads (default: one per core). The result does not depend on it.",
    )
    add("--dry-run", action="store_true", help="Open the source, estimate size and time, and stop.")
    add("--restart", action="store_true", help="Discard the state of an interrupted conversion.")
    add("--overwrite", action="store_true", help="Replace the outputs if they exist.")


def _other_tasks(group: argparse._ArgumentGroup) -> None:
    does = group.add_mutually_exclusive_group()
    does.add_argument(
        "--merge", metavar="OUT.beton", help="Put the parts of OUT.beton together, which --shard has made."
    )
    does.add_argument(
        "--verify",
        metavar="FILE",
        help="Check a beton, a tar or a folder of tars. The exit status is 1 if anything is wrong.",
    )
    does.add_argument("--inspect", metavar="FILE", help="Describe a beton, and draw a contact sheet.")
    group.add_argument(
        "--remove-parts", action="store_true", help="With --merge: remove the parts when all is written."
    )
    group.add_argument("--sheet", metavar="PNG", help="The contact sheet to write (default: FILE.png).")


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not K/N, such as 3/8")
    return int(found.group(1)), int(found.group(2))


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0; 1 if --verify finds something or the system refuses a
    file; 2 after a user error; 130 after Ctrl-C; 143 after SIGTERM."""
    p = parser()
    args, unknown = p.parse_known_args(argv)
    if unknown:
        hint = unquoted(sys.argv[1:] if argv is None else argv)
        p.error(hint or f"unrecognized arguments: {' '.join(unknown)}")
    asked = any(getattr(args, name) for name in OTHER_TASKS)
    if asked and args.source is not None:
        p.error(f"{args.source}: --merge, --verify and --inspect take one file, and no source")
    if not asked and (args.source is None or (args.out is None and args.webdataset is None)):
        missing = "SOURCE" if args.source is None else "OUT.beton (or --webdataset DIR)"
        p.error(f"the following arguments are required: {missing}")
    if args.remove_parts and not args.merge:
        p.error("--remove-parts goes with --merge")
    hide_decoders_warnings()
    task = next((run for name, run in OTHER_TASKS.items() if getattr(args, name)), _convert)
    told: list[int] = []  # SIGTERM, if it came: it stops the conversion cleanly, like Ctrl-C

    def stop(number: int, _: Any) -> NoReturn:
        told.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return task(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a name that is too long, no permission
        print(f"error: {in_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        kept = f"{interrupt}; repeat the command to resume" if str(interrupt) else "nothing was written"
        print(f"{'terminated' if told else 'interrupted'}: {kept}", file=sys.stderr)
        return 143 if told else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _merge(args: argparse.Namespace) -> int:
    from pipelines.convert.merge import merge

    manifest = merge(args.merge, _options(args, OutputOptions), args.remove_parts)
    _report(args.merge, manifest)
    if parts := manifest["parts"]:
        size = size_text(sum(os.path.getsize(path) for path in parts))
        print(f"its {len(parts)} parts ({size}) are still there, {parts[0]} ...: see --remove-parts")
    return 0


def _convert(args: argparse.Namespace) -> int:
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    manifest = convert(args.source, args.out, settings, _options(args, ConvertOptions))
    if not args.dry_run:
        _report(str(part_path(args.out, args.shard) or args.webdataset), manifest)
    return 0


def _options(args: argparse.Namespace, kind: type[Options]) -> Options:
    """Build the options of a conversion or a merge."""
    chosen = {each.name: getattr(args, each.name) for each in fields(kind) if each.name != "progress"}
    return kind(**chosen, progress=True)


def _verify(args: argparse.Namespace) -> int:
    from pipelines.convert.verify import verify

    verdict = verify(args.verify, args.workers, progress=True)
    print(verdict if verdict.sound else f"error: {verdict}", file=sys.stdout if verdict.sound else sys.stderr)
    return 0 if verdict.sound else 1


def _inspect(args: argparse.Namespace) -> int:
    from pipelines.convert.inspect import inspect

    jpeg.read_up_to(jpeg.ANY_SIZE)  # the images were within the limit when they were stored

    print(inspect(args.inspect, args.sheet or args.inspect.rstrip("/") + ".png"))
    return 0


def _report(out: str, manifest: dict[str, Any]) -> None:
    skipped = manifest["refused"]
    for each in skipped[:WARNINGS_SHOWN]:
        print(f"warning: skipped {each['name']}: {each['reason']}", file=sys.stderr)
    if len(skipped) > WARNINGS_SHOWN:
        more = len(skipped) - WARNINGS_SHOWN
        print(f"warning: skipped {more} more, which are named in the manifest", file=sys.stderr)
    words = {"jpeg_untouched": "JPEG as they were", "turned_upright": "turned upright"}
    stored = [f"{n:,} {words.get(kind, kind)}" for kind, n in manifest["stored"].items() if n]
    rate = (manifest["count"] - manifest["resumed"]) / manifest["seconds"]
    earlier = f", {manifest['resumed']:,} of them earlier" if manifest["resumed"] else ""
    where = f"{out}.json" if manifest["format"] == "beton" else f"{out.rstrip('/')}/manifest.json"
    targets = manifest["targets"]
    among = f"in {len(manifest['classes'])} classes" if manifest["classes"] else "without labels"
    among = f"with {', '.join(targets)}" if targets else among
    print(
        f"{out}: {manifest['count']:,} images ({', '.join(stored)}) {among}, "
        f"{len(skipped)} skipped, {manifest['bytes'] / 1e6:,.1f} MB in {manifest['seconds']:.1f} s "
        f"({max(rate, 0):,.0f} img/s{earlier}); manifest {where}"
    )


OTHER_TASKS = {"merge": _merge, "verify": _verify, "inspect": _inspect}


if __name__ == "__main__":
    sys.exit(main())
