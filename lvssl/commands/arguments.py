"""A command's arguments as its settings."""

import argparse
import sys
from typing import Any


def parse(
    kind: Any, arguments: list[str], command: str, default: Any = None, about: str | None = None
) -> Any:
    """Command-line arguments as a dataclass of settings."""
    import tyro

    from pipelines.datasets.parts import unquoted

    options = {} if default is None else {"default": default}
    try:
        return tyro.cli(
            kind,
            args=arguments,
            prog=f"lvssl {command}",
            description=about or (kind.__doc__ or ""),
            config=(tyro.conf.OmitArgPrefixes,),
            **options,
        )
    except SystemExit as ended:
        if ended.code and (hint := unquoted(arguments)):
            print(f"error: {hint}", file=sys.stderr)
        raise


def preset_in(arguments: list[str]) -> str | None:
    """The preset that is named, which the other settings start from."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    return first.parse_known_args(arguments)[0].preset
