"""One set in many files: which files a path names, and which files a series lacks.

train-*.beton                a pattern: matching files, by the numbers in their names; none may be missing
train-{000000..000146}.tar   all numbers of a range; {a,b}: all names of a list
parts.txt                    paths, one per line, relative to the folder of this file
"""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from pipelines.datasets.recognise import has_image_name
from pipelines.errors import InputError

_PART = re.compile(r"\.part-[0-9]+-of-[0-9]+(?=\.)")  # in names that `convert-beton --shard` writes
_NUMBER = re.compile(r"(?<![0-9])(?<!-of-)([0-9]+)")  # a number in a name, except the number of parts


def files_of(path: str | Path) -> list[Path]:
    """The files that a path names, in the order of the set. A path that is neither a pattern nor a list names
    itself, whether it exists or not; a pattern that matches nothing names none."""
    text, path = str(path), Path(path)
    if path.suffix.lower() == ".txt" and path.is_file():
        try:
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: can't be read as a list of files ({error})") from error
        return [path.parent / line for line in lines if line]
    if path.exists() or is_by_name(path):
        return [path]
    files = [Path(each) for each in _expanded(text)]
    if glob.has_magic(text):
        found = [Path(each) for file in files for each in glob.glob(str(file))]
        return sorted(found, key=lambda file: [_number(each) for each in re.split("([0-9]+)", str(file))])
    return files


def is_by_name(path: str | Path) -> bool:
    """Whether this is the name of a set of torchvision or scikit-learn, and not a path."""
    return str(path).startswith(("torchvision:", "sklearn:"))


def in_full(path: Path) -> Path:
    """The path from the root, or the name of a set that has one."""
    return path if is_by_name(path) else path.absolute()


def unquoted(arguments: Sequence[str]) -> str:
    """An error message for arguments that contain a pattern's files, expanded by a shell; empty otherwise."""
    for end, each in itertools.groupby(arguments, lambda argument: Path(argument).suffix):
        files = [argument for argument in each if Path(argument).is_file()]
        if end.lower() in (".beton", ".tar", ".parquet", ".arrow") and len(files) > 1:
            same = itertools.takewhile(lambda letters: len({*letters}) == 1, zip(*files))
            pattern = "'" + "".join(letters[0] for letters in same).rstrip("0123456789") + f"*{end}'"
            return f"{len(files)} files where one set is named: put the pattern in quotes, such as {pattern}"
    return ""


def are_there(path: str | Path) -> bool:
    """Whether a path exists, and with it all files that a list or range names; sets with a name always do."""
    files = files_of(path)
    return is_by_name(path) or (bool(files) and all(file.exists() for file in files))


def parts_of(path: str | Path) -> list[Path]:
    """`files_of`, but raises InputError if a pattern matches no file, or an incomplete series."""
    files = files_of(path)
    if not files:
        why = "names no files" if Path(path).is_file() else "no such file: no name there fits"
        raise InputError(f"{path}: {why}")
    if any(has_image_name(file.name) and file.is_file() for file in files):
        raise InputError(f"{path}: matches images, not a set of them: pass their folder")
    if len({*files}) < len(files):
        raise InputError(f"{path}: names {next(f for f in files if files.count(f) > 1)} twice")
    if glob.has_magic(str(path)) and files != [Path(path)]:
        require_whole(str(path), files)
    return files


def require_whole(path: str, files: list[Path]) -> None:
    """Raise InputError if the names of `files` are numbered, and one is missing or occurs twice."""
    names = {file.name for file in files}
    for name in sorted(names):
        if (whole := _PART.sub("", name)) != name and whole in names:
            raise InputError(f"{path}: matches {whole} and a part of it, {name}: pass only one of the two")
    counts = {found for name in names for found in re.findall("-of-([0-9]+)", name)}
    if len(counts) > 1:
        raise InputError(f"{path}: its parts are of {' and '.join(sorted(counts))}: remove the wrong ones")
    split = [_NUMBER.split(file.name) for file in files]
    first, places = split[0], range(1, len(split[0]), 2)
    if len({(file.parent, *pieces[::2]) for file, pieces in zip(files, split)}) > 1 or not places:
        return  # not a single series
    varies = [k for k in places if len({pieces[k] for pieces in split}) > 1] or [places[-1]]
    there = {int(pieces[varies[0]]) for pieces in split}
    start, end = min(there), max(there) + 1
    for count in map(int, counts):
        start = 1 if count in there or _PART.search(files[0].name) else 0
        end = start + count
    missing = [number for number in range(start, end) if number not in there]
    if len(varies) > 1 or not missing or (not counts and len(missing) > len(there)):  # dates aren't a series
        return
    digits = min(len(pieces[varies[0]]) for pieces in split)
    before, after = "".join(first[: varies[0]]), "".join(first[varies[0] + 1 :])
    named = [f"{before}{number:0{digits}d}{after}" for number in missing[:3]]
    shown = ", ".join(named) + (" ..." if len(missing) > 3 else "")
    raise InputError(f"{path}: {len(missing)} of {end - start} parts are missing: {shown}")


def _expanded(text: str) -> list[str]:
    """a-{08..10}.tar -> a-08.tar, a-09.tar, a-10.tar; {a,b}.tar -> a.tar, b.tar; any other text -> itself."""
    found = re.fullmatch(r"([^{}]*)\{([^{}]+)\}(.*)", text, re.DOTALL)
    if found is None:
        return [text]
    before, inside, after = found.groups()
    each = inside.split(",")
    if numbers := re.fullmatch(r"([0-9]+)\.\.([0-9]+)", inside):
        first, last = numbers.groups()
        each = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [f"{before}{one}{rest}" for one in each for rest in _expanded(after)]


def _number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (0, text)
