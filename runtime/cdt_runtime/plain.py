"""Dataclasses from the plain values of a JSON file, each value of the type that its field says.

Whoever writes a bundle may write anything into its manifest; what is not of its type is refused
here, in one line, and never met by the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cdt_runtime.errors import BundleError

T = TypeVar("T")


def from_plain(kind: type[T], values: Any, what: str) -> T:
    """Build a dataclass from a JSON object.

    Args:
        kind: the dataclass.
        values: what `json` read.
        what: it is, for errors.

    Raises:
        BundleError: a key is missing or unknown, or a value is of another type than its field.
    """
    made: T = _made(kind, values, what)
    return made


def _made(kind: type, values: Any, what: str) -> Any:
    hints = _hints(kind)
    if not isinstance(values, Mapping) or set(values) != set(hints):
        odd = ", ".join(sorted(map(str, set(values) ^ set(hints)))) if _is(values) else "not a map"
        raise BundleError(f"{what}: keys missing or unknown: {odd[:200]}: export again")
    return kind(**{name: _value(hints[name], values[name], f"{what}.{name}") for name in hints})


def _is(values: Any) -> bool:
    return isinstance(values, Mapping)


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _value(hint: Any, value: Any, what: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        (kind,) = (one for one in inner if one is not NoneType)
        return _value(kind, value, what)
    if origin is Literal:
        if any(value == one and type(value) is type(one) for one in inner):
            return value
        raise _wrong(what, value, f"one of {', '.join(map(str, inner))}")
    if origin is tuple and isinstance(value, list):
        if inner[-1] is Ellipsis:
            return tuple(_value(inner[0], one, what) for one in value)
        if len(value) == len(inner):
            return tuple(_value(kind, one, what) for kind, one in zip(inner, value, strict=True))
    elif origin is Mapping and isinstance(value, Mapping):
        return {str(key): _value(inner[1], one, what) for key, one in value.items()}
    elif is_dataclass(hint) and isinstance(hint, type):
        return _made(hint, value, what)
    elif hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    raise _wrong(what, value, getattr(hint, "__name__", str(hint)))


def _wrong(what: str, value: Any, expected: str) -> BundleError:
    return BundleError(f"{what} is {str(value)[:60]!r}, expected {expected}: export again")
