"""The page's templates: HTML, style sheet and script, rendered by jinja2, which escapes every value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def finite(value: Any) -> bool:
    """Return whether the value is a number that can be shown: not a bool, missing, infinite or undefined."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.tests["finite"] = finite


def render(name: str, **values: Any) -> Markup:
    """Render the template of that name."""
    return Markup(TEMPLATES.get_template(name).render(values))
