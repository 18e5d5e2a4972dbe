"""What all settings share: each field itself records whether it changes the result, and how it is typed.

This determines what identifies a result, how two settings differ, and the command line for some settings.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pipelines.datasets.parts import is_by_name
from pipelines.errors import InputError

# For settings of where and how fast, not of what is computed. A resumed run, a repeated stage and a
# relaunched pipeline may have other values and still find their results.
RUNTIME = {"runtime": True}
POSITIONAL = {"runtime": True, "positional": True}  # given without the setting's name
PER_CALL = {"runtime": True, "per_call": True}  # for one call, not for reproducing a result


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadsImages:
    """The settings of every command that reads images."""

    max_pixels: int | None = None
    """Largest image to decode, in pixels; larger images count as images that can't be decoded, see
    --on-error. If omitted, the limit of the pretraining, which is 2^28 by default. A .beton has the limit
    that it was converted with."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting with its value."""

    name: str  # "group.name" in a group
    value: Any
    default: Any  # dataclasses.MISSING if it is required
    metadata: Mapping[str, bool]

    @property
    def option(self) -> str:
        """Name on the command line, where there are no groups."""
        return self.name.rpartition(".")[2]


def all_settings(settings: Any, start: Any = None) -> Iterator[Setting]:
    """Yield every setting, including those in groups. `start`: settings to use as defaults."""
    for field in dataclasses.fields(settings):
        value, default = getattr(settings, field.name), field.default
        if start is not None:
            default = getattr(start, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(value):
            for inner in all_settings(value, default):
                yield dataclasses.replace(inner, name=f"{field.name}.{inner.name}")
        else:
            yield Setting(field.name, value, default, field.metadata)


def flat_hints(kind: Any) -> dict[str, Any]:
    """Map the options of settings of that kind, including those in groups, to their types."""
    flat: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        flat |= flat_hints(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return flat


def require_finite(settings: Any) -> None:
    """Raise InputError for the first number that is infinite or NaN; none of our settings may be."""
    for s in all_settings(settings):
        for value in s.value if isinstance(s.value, tuple) else (s.value,):
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{flag(s.option)} must be a finite number, got {value}")


def without_effect(settings: Any, needed: Mapping[str, str], where: str = "") -> str:
    """Return what to say of the first setting that isn't at its default but has no effect; "" if there is
    none. `needed`: the option that would give it one, by the setting's option."""
    for setting in all_settings(settings):
        if setting.option in needed and setting.value != setting.default:
            said = f"{flag(setting.option)} has no effect{where}"
            return f"{said}: leave it out, or pass {needed[setting.option]}"
    return ""


def runtime(settings: Any) -> set[str]:
    """Return the names of the settings that don't change a result."""
    return {s.name for s in all_settings(settings) if s.metadata.get("runtime")}


def relevant(settings: Any, ignore: Collection[str] = ()) -> list[Setting]:
    """Return the settings that a result depends on, except those whose option is to be ignored."""
    return [s for s in all_settings(settings) if not s.metadata.get("runtime") and s.option not in ignore]


def identity(settings: Any) -> dict[str, Any]:
    """Return what a result depends on as plain JSON values; paths are absolute, so any folder will do."""
    return _plain({s.name: _in_full(s.value) for s in relevant(settings)})


def beyond_defaults(settings: Any, ignore: Collection[str] = ()) -> dict[str, Any]:
    """Return what a result depends on and differs from the defaults, as JSON values by option.

    Settings are identified by these alone. If a later version adds a setting whose default changes nothing,
    existing identities stay the same.
    """
    return {s.option: _plain(s.value) for s in relevant(settings, ignore) if s.value != s.default}


def difference(a: Any, b: Any, ignore: Collection[str] = ()) -> str:
    """Return the first relevant setting that differs between a and b, as "name: x -> y"; "" if none does."""
    had, wanted = ({s.name: _plain(s.value) for s in relevant(x, ignore)} for x in (a, b))
    return first_change(had, wanted)


def first_change(had: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the first name whose values differ, as "name: x -> y"; "" if none does."""
    for name in {**had, **wanted}:
        if had.get(name) != wanted.get(name):
            return f"{name}: {had.get(name)} -> {wanted.get(name)}"
    return ""


def command_line(command: str, settings: Any, start: Any = None) -> str:
    """Return the command for these settings: what differs from the defaults, or from the preset `start`."""
    found = [s for s in all_settings(settings, start) if not s.metadata.get("per_call")]
    words = ["lvssl", command, *(as_word(s.value) for s in found if s.metadata.get("positional"))]
    given = {"preset": start.preset} if start is not None else {}
    for s in found:
        if not s.metadata.get("positional") and s.value != s.default:
            given[s.option] = s.value
    return shlex.join([*words, *options(given)])


def options(given: Mapping[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    words: list[str] = []
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            values = value if isinstance(value, list | tuple) else (value,)
            words += [flag(name), *map(as_word, values)]
    return words


def flag(name: str) -> str:
    """Return a setting's option as it is typed: top_n -> --top-n."""
    return "--" + name.replace("_", "-")


def shell_line(*words: Any) -> str:
    """Join words into a line for a shell; see `as_word`."""
    return shlex.join(map(as_word, words))


def as_word(value: Any) -> str:
    """Return a value as a word of a command line; a path that begins with a dash won't look like an
    option."""
    return f"./{value}" if isinstance(value, Path) and str(value).startswith("-") else str(value)


def to_dict(settings: Any) -> dict[str, Any]:
    """Return settings as plain JSON values."""
    return _plain(dataclasses.asdict(settings))


def from_dict(kind: Any, values: Any, where: str = "config") -> Any:
    """Create settings from JSON values. Raises InputError if they are not an object, or naming an unknown
    setting or a value of a wrong type."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: settings by name are expected, not {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where}: unknown setting {unknown[0]!r} (written by another version?)")
    made = {}
    for name, value in values.items():
        kind_of = fields[name].type
        if isinstance(value, bool):
            value = fields[name].metadata.get("was", {}).get(value, value)  # an older version's value
        if dataclasses.is_dataclass(kind_of):
            made[name] = from_dict(kind_of, value, f"{where}.{name}")
            continue
        made[name] = typed(value, kind_of)
        if made[name] is WRONG:
            wanted = getattr(kind_of, "__name__", str(kind_of)) if not get_args(kind_of) else str(kind_of)
            raise InputError(f"{where}: {name} should be of type {wanted}, not {str(value)[:40]!r}")
    return kind(**made)


def replaced(settings: Any, flat: Mapping[str, Any]) -> Any:
    """Replace settings by the values in `flat`, in whichever group has them."""
    changes = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = replaced(value, flat)
        elif f.name in flat:
            given = flat[f.name]
            changes[f.name] = tuple(given) if isinstance(given, list) else given
    return dataclasses.replace(settings, **changes)


WRONG = object()


def typed(value: Any, kind: Any) -> Any:
    """Convert a value from JSON or TOML to a setting's type; WRONG if that isn't possible."""
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if not isinstance(value, list) or (kinds[-1] is not Ellipsis and len(value) != len(kinds)):
            return WRONG
        made = tuple(typed(one, kinds[0]) for one in value)  # tuples have a single element type
        return WRONG if WRONG in made else made
    if get_origin(kind) is Mapping:
        sound = isinstance(value, dict) and WRONG not in [typed(v, get_args(kind)[1]) for v in value.values()]
        return value if sound else WRONG
    if get_args(kind):  # a union
        return next((made for one in get_args(kind) if (made := typed(value, one)) is not WRONG), WRONG)
    if kind is Path:
        return Path(value) if isinstance(value, str) and value else WRONG  # "" would be the current folder
    accepted = (int, float) if kind is float else kind
    sound = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    return value if sound else WRONG


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested objects to "name.name"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _in_full(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_in_full(one) for one in value]
    return value.resolve() if isinstance(value, Path) and not is_by_name(value) else value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
