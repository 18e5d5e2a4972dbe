"""Turn an image data set into a beton (FFCV), into WebDataset tars (DALI,
webdataset), or both in one pass.

    convert-beton photos/ photos.beton                                 # photos/CLASS/IMAGE.jpg
    convert-beton ILSVRC2012_img_train.tar train.beton                 # ImageNet as downloaded
    convert-beton ILSVRC2012_img_val.tar val.beton --devkit ILSVRC2012_devkit_t12.tar.gz
    convert-beton imagenet/ val.beton --split validation               # imagenet/val/CLASS/IMAGE.JPEG
    convert-beton imagenet/ train.beton --webdataset train-tars/       # both in one pass
    convert-beton 'train-{000000..000146}.tar' train.beton             # WebDataset shards
    convert-beton cifar10-jpeg/ test.beton --split test                # Hugging Face image parquet
    convert-beton photos/ photos.beton                                 # unlabelled images, to pretrain
    convert-beton table.csv out.beton                                  # columns path and label
    convert-beton ages.csv ages.beton --targets age                    # path,age: regression
    convert-beton /usr/share/datasets/fashion-mnist train.beton        # MNIST's idx files
    convert-beton torchvision:CIFAR10 train.beton --root data          # downloaded if necessary
    convert-beton sklearn:digits digits.beton                          # always available

    convert-beton imagenet/ train.beton --shard 3/8                    # the third job of an array of eight
    convert-beton --merge train.beton                                  # when all eight have finished
    convert-beton --verify train.beton                                 # check every byte and every image
    convert-beton --inspect train.beton                                # counts, sizes, a sheet of images

Each JPEG is decoded as a check and stored byte for byte. Images are re-encoded only if necessary:
JPEGs that are larger than --max-resolution, CMYK, of an unusual chroma subsampling, or rotated by
EXIF; and other formats (PNG and so on). Images in other formats are stored as raw pixels instead
if they have at most 64 x 64 pixels, or if their lossless file is smaller than a JPEG of them (line
art). Damaged images are skipped and named in OUT.beton.json. To resume an interrupted conversion,
run the same command again; the resulting bytes are the same.
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
from pipelines.errors import IS_EMPTY, ON_ERROR, InputError, hide_decoders_warnings
from pipelines.formats import jpeg, turbojpeg
from pipelines.formats.webdataset import IMAGES_PER_TAR
from pipelines.output import run

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
        "out",
        metavar="OUT.beton",
        nargs="?",
        help="The file to write. Its manifest is written to OUT.beton.json.",
    )
    _source_options(p.add_argument_group("input"))
    _stored_options(p.add_argument_group("output"))
    _run_options(p.add_argument_group("execution"))
    _other_tasks(p.add_argument_group("instead of a conversion"))
    return p


def _source_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--split", choices=SPLITS, help="Which part of the source to read, if it has parts (default: train).")
    add(
        "--classes",
        metavar="FILE",
        help="Number the classes in the order of this manifest or text file (one name per line).",
    )
    add(
        "--devkit",
        metavar="FILE",
        help="ImageNet's development kit, needed for its validation tar (default: the one next to the tar).",
    )
    add(
        *("--image-column", "--image-key"),
        metavar="NAME",
        help="The column with the images or their paths, if its name is unusual; in a tar with several "
        "images per sample, the part of the file name after the key (left.jpg).",
    )
    add(
        *("--label-column", "--label-key"),
        metavar="NAME",
        help="The column with the classes, if its name is unusual; in a tar, a file extension or a field of "
        "the .json. `none` means not to read labels.",
    )
    add(
        "--targets",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Numeric columns (in a tar, fields of the .json) to store as regression targets.",
    )
    add("--root", default="data", metavar="DIR", help="The folder of torchvision's files (default: data).")
    add(
        "--only-classes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Read only images of these classes (default: all). The classes keep their numbers.",
    )
    add("--subset", type=int, metavar="N", help="Read only N images, balanced over the classes.")
    add(
        "--shuffle-seed",
        type=int,
        metavar="S",
        help="Shuffle the images with this seed (default: keep the order of the source).",
    )
    add(
        "--shard",
        type=_shard,
        metavar="K/N",
        help="Convert only the K-th of N parts (K from 1 to N). See --merge.",
    )


def _stored_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--webdataset", metavar="DIR", help="Write tars with wds2idx indices to this new folder.")
    add(
        "--images-per-tar",
        type=int,
        default=IMAGES_PER_TAR,
        metavar="N",
        help=f"Number of images per tar (default: {IMAGES_PER_TAR}).",
    )
    add("--max-resolution", type=int, metavar="N", help="Shrink images whose longest side exceeds N pixels.")
    add(
        "--max-pixels",
        type=int,
        default=jpeg.MAX_PIXELS,
        metavar="N",
        help=f"Skip images with more than N pixels (default: {jpeg.MAX_PIXELS}).",
    )
    add(
        "--jpeg-quality",
        type=int,
        default=90,
        metavar="Q",
        help="JPEG quality of re-encoded images, 1 to 100 (default: 90).",
    )
    add(
        "--jpeg-sampling",
        choices=list(turbojpeg.SAMPLINGS),
        default="4:2:0",
        help="Chroma subsampling of re-encoded images. 4:4:4 preserves thin coloured lines better, but takes "
        "half as much space again and decodes more slowly (default: 4:2:0).",
    )
    add(
        "--line-art",
        choices=LINE_ART,
        default="raw",
        help="How to store images whose PNG, GIF, BMP or lossless WebP file is smaller than a JPEG of them: "
        "as RGB pixels (exact, but large) or as that JPEG (default: raw).",
    )
    add(
        "--raw-proportion",
        type=float,
        default=0.0,
        metavar="P",
        help="Proportion of the images to store as RGB pixels, 0 to 1. They are large, but need no decoding "
        "(default: 0).",
    )
    add(
        "--white-level",
        type=int,
        metavar="N",
        help="Value of white in images of more than 8 bits that do not specify it (4095 for 12 bits).",
    )


def _run_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--on-error",
        choices=ON_ERROR,
        default="skip",
        help="What to do with a damaged image: skip it and name it in the manifest, raise an error and stop, "
        "or keep what Pillow decodes from a JPEG that libjpeg-turbo reports as damaged (default: skip).",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="Number of threads (default: one per core). The output does not depend on it.",
    )
    add("--dry-run", action="store_true", help="Open the source, estimate size and time, and stop.")
    add("--restart", action="store_true", help="Discard the state of an interrupted conversion.")
    add("--overwrite", action="store_true", help="Replace the outputs if they exist.")


def _other_tasks(group: argparse._ArgumentGroup) -> None:
    does = group.add_mutually_exclusive_group()
    does.add_argument(
        "--merge", metavar="OUT.beton", help="Merge the parts of OUT.beton that --shard has written."
    )
    does.add_argument(
        "--verify",
        metavar="FILE",
        help="Check a beton, a tar or a folder of tars. The exit status is 1 if anything is wrong.",
    )
    does.add_argument("--inspect", metavar="FILE", help="Describe a beton and draw a contact sheet.")
    group.add_argument(
        "--remove-parts",
        action="store_true",
        help="With --merge: remove the parts once the output is complete.",
    )
    group.add_argument("--sheet", metavar="PNG", help="The contact sheet to write (default: FILE.png).")


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not K/N, such as 3/8")
    return int(found.group(1)), int(found.group(2))


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0; 1 if --verify finds something or the system refuses a
    file; 2 after a user error; 130 after Ctrl-C; 141 if the reader of the output has closed it; 143 after
    SIGTERM."""
    return run(execute, argv)


def execute(argv: list[str] | None) -> int:
    """Parse the arguments and do what they ask."""
    p = parser()
    args, unknown = p.parse_known_args(argv)
    if unknown:
        hint = unquoted(sys.argv[1:] if argv is None else argv)
        p.error(hint or f"unrecognized arguments: {' '.join(unknown)}")
    for name, value in vars(args).items():
        if value == "":  # an unset variable of the shell; as a path, it would be the current folder
            named = {"source": "SOURCE", "out": "OUT.beton"}.get(name, f"--{name.replace('_', '-')}")
            p.error(f"{named} {IS_EMPTY}")
    asked = any(getattr(args, name) for name in OTHER_TASKS)
    if asked and args.source is not None:
        p.error(f"{args.source}: --merge, --verify and --inspect take a single file and no SOURCE")
    if not asked and (args.source is None or (args.out is None and args.webdataset is None)):
        missing = "SOURCE" if args.source is None else "OUT.beton (or --webdataset DIR)"
        p.error(f"the following arguments are required: {missing}")
    if asked:
        _refuse_unused(p, args)
    if args.remove_parts and not args.merge:
        p.error("--remove-parts can only be used with --merge")
    hide_decoders_warnings()
    task = next((task for name, task in OTHER_TASKS.items() if getattr(args, name)), _convert)
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
    except KeyboardInterrupt as interrupt:
        kept = (
            f"{interrupt}; run the same command again to resume" if str(interrupt) else "nothing was written"
        )
        print(f"{'terminated' if told else 'interrupted'}: {kept}", file=sys.stderr)
        return 143 if told else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_unused(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error at an option that --merge, --verify or --inspect would ignore."""
    task = next(name for name in OTHER_TASKS if getattr(args, name))
    for name, value in vars(args).items():
        if name not in (task, *USED[task]) and value != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} has no effect with --{task}; leave it out")


def _merge(args: argparse.Namespace) -> int:
    from pipelines.convert.merge import merge

    manifest = merge(args.merge, _options(args, OutputOptions), args.remove_parts)
    _report(args.merge, manifest)
    if parts := manifest["parts"]:
        size = size_text(sum(os.path.getsize(path) for path in parts))
        print(f"its {len(parts)} parts ({size}) are kept ({parts[0]} ...); --remove-parts removes them")
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
        print(f"warning: skipped {more} more, named in the manifest", file=sys.stderr)
    if several := manifest["several_frames"]:
        files = f"{several:,} file{'s have' if several > 1 else ' has'}"
        print(f"note: {files} several pages or frames, of which the first was taken", file=sys.stderr)
    words = {"jpeg_untouched": "JPEG unchanged", "turned_upright": "turned upright"}
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
USED = {  # the other options that each of them heeds
    "merge": ("webdataset", "images_per_tar", "workers", "restart", "overwrite", "remove_parts"),
    "verify": ("workers",),
    "inspect": ("sheet",),
}


if __name__ == "__main__":
    sys.exit(main())
