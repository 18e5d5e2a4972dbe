"""Write the lower bounds in pyproject.toml as a constraints file for pip, which `make test-oldest` uses.

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
    """One line `name==version` for each package that the table `project` requires, including its extras.

    Markers of requirements are kept, and duplicates are removed. Raises ValueError if a package has no lower
    bound (`>=`), or two different ones.
    """
    asked = chain(project["dependencies"], *project["optional-dependencies"].values())
    lines: dict[tuple[str, str], str] = {}
    for requirement in map(Requirement, asked):
        if requirement.name == project["name"]:
            continue  # an extra that includes another extra
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
