"""Parse a command's arguments into its settings."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator
from itertools import pairwise, takewhile
from types import MappingProxyType
from typing import Any, get_args


def parse(
    kind: Any, arguments: list[str], command: str, default: Any = None, about: str | None = None
) -> Any:
    """Parse command-line arguments into a dataclass of settings. Raises InputError for infinity and NaN."""
    import tyro

    from lvssl.settings.fields import flag, flat_hints, require_finite
    from pipelines.datasets.parts import unquoted

    known = {flag(name): of for name, of in flat_hints(kind).items()}
    refuse_empty(arguments, {option for option, of in known.items() if str in (of, *get_args(of))})
    start = {} if default is None else {"default": default}
    if asks_for_help(arguments):
        join_lines_of_help(kind)
    else:
        refuse_unknown(arguments, known, command)
    try:
        settings = tyro.cli(
            kind,
            args=arguments,
            prog=f"lvssl {command}",
            description=paragraphs(about or inspect.getdoc(kind) or ""),
            config=(tyro.conf.OmitArgPrefixes,),
            **start,
        )
    except SystemExit as ended:
        if ended.code and (hint := unquoted(arguments)):
            print(f"error: {hint}", file=sys.stderr)
        raise
    require_finite(settings)
    return settings


def refuse_empty(arguments: list[str], texts: Collection[str]) -> None:
    """Raise InputError at an empty argument, unless it is the value of one of the options `texts`.

    `--out "$OUT"` is empty if there is no such variable, and `Path("")` would be the current folder.
    """
    from pipelines.errors import IS_EMPTY, InputError

    for before, word in pairwise(["", *arguments]):
        option, equals, value = word.partition("=")
        if word and (value or not equals or not word.startswith("--")):
            continue
        option = option or before
        if option not in texts:
            name = option if option.startswith("--") else "an argument"
            raise InputError(f"{name} {IS_EMPTY}")


def refuse_unknown(arguments: list[str], known: dict[str, Any], command: str) -> None:
    """Raise InputError at an unknown option: if a required argument is missing, tyro names only that."""
    from pipelines.errors import InputError

    negations = [f"--no{option[1:]}" for option, of in known.items() if of is bool]
    completion = ["--tyro-print-completion", "--tyro-write-completion"]
    names = [*known, *negations, *completion]
    for word in takewhile(lambda word: word != "--", arguments):
        option = word.partition("=")[0]
        if option.startswith("--") and option.replace("_", "-") not in names:
            near = difflib.get_close_matches(option, names, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"no option {option}{meant} (`lvssl {command} --help` lists all)")


def asks_for_help(arguments: list[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def paragraphs(text: str) -> str:
    """Wrap each paragraph at the terminal's width, where tyro only wraps what is in its boxes. It would join
    the lines again if they weren't indented."""
    width = shutil.get_terminal_size().columns
    wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False)
    return "\n\n".join(wrap.fill(paragraph) for paragraph in text.split("\n\n"))


def join_lines_of_help(kind: type) -> None:
    """Set each setting's docstring as one line of help. tyro would keep the line breaks of an indented
    docstring, and break each of its lines again in a narrower terminal."""
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        docs = dict(docstrings(base))
        for field in dataclasses.fields(base):
            if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
                join_lines_of_help(field.type)
            elif field.name in docs:
                field.metadata = MappingProxyType({**field.metadata, "help": docs[field.name]})


def docstrings(kind: type) -> Iterator[tuple[str, str]]:
    """Yield each field that is followed by a string in the class's source, with its text as one line."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except OSError:  # installed without sources
        return
    (parsed,) = ast.parse(source).body
    assert isinstance(parsed, ast.ClassDef)
    for statement, below in pairwise(parsed.body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


def preset_in(arguments: list[str]) -> str | None:
    """Return the named preset, from which the other settings start."""
    first = argparse.ArgumentParser(usage="lvssl ... --preset NAME", add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    return first.parse_known_args(arguments)[0].preset
