"""The lower bounds of pyproject.toml as a constraints file for pip: `make test-oldest` installs by it.

python tools/lower_bounds.py >constraints.txt
"""

import sys
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lower_bounds(project: dict) -> list[str]:
    """One line `name==version` for each package that the table `project` asks for, its extras included.

    A requirement's marker goes along, and a package named twice stands once. Raises ValueError where one has
    no lower bound (`>=`), or two different ones.
    """
    asked = chain(project["dependencies"], *project["optional-dependencies"].values())
    lines: dict[tuple[str, str], str] = {}
    for requirement in map(Requirement, asked):
        if requirement.name == project["name"]:
            continue  # an extra that includes another
        bounds = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"pyproject.toml: {requirement} has no lower bound")
        marker = f"; {requirement.marker}" if requirement.marker else ""
        line = f"{requirement.name}=={bounds[0]}{marker}"
        if lines.setdefault((requirement.name, marker), line) != line:
            raise ValueError(f"pyproject.toml: {requirement.name} has two lower bounds")
    return list(lines.values())


if __name__ == "__main__":
    print(*lower_bounds(tomllib.loads(PYPROJECT.read_text())["project"]), sep="\n")
