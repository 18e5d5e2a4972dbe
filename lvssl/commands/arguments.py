"""Parse a command's arguments into its settings."""

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from types import MappingProxyType
from typing import Any


def parse(
    kind: Any, arguments: list[str], command: str, default: Any = None, about: str | None = None
) -> Any:
    """Parse command-line arguments into a dataclass of settings."""
    import tyro

    from pipelines.datasets.parts import unquoted

    options = {} if default is None else {"default": default}
    if asks_for_help(arguments):
        join_lines_of_help(kind)
    try:
        return tyro.cli(
            kind,
            args=arguments,
            prog=f"lvssl {command}",
            description=paragraphs(about or inspect.getdoc(kind) or ""),
            config=(tyro.conf.OmitArgPrefixes,),
            **options,
        )
    except SystemExit as ended:
        if ended.code and (hint := unquoted(arguments)):
            print(f"error: {hint}", file=sys.stderr)
        raise


def asks_for_help(arguments: list[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def paragraphs(text: str) -> str:
    """Join the lines of each paragraph."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


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
