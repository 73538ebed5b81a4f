"""Frozen dataclasses that are checked when they are made and round-trip through JSON."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing


def check(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


class Config:
    """to_dict and from_dict for frozen dataclasses with nested dataclasses and tuples of them."""

    def to_dict(self) -> dict:
        """JSON values that `from_dict` reads."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: dict):
        """Build from plain JSON values.

        Raises:
            ValueError: unknown, missing or wrongly typed fields, or values the class refuses; the field is named.
        """
        return build(cls, data)


def build(cls, data: dict, **ready):
    """An object from JSON values, and from fields that are objects already."""
    check(isinstance(data, dict), f"{cls.__name__}: expected an object, got {type(data).__name__}")
    hints, names = _type_hints(cls), {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - names, key=str)
    check(not unknown, f"{cls.__name__}: unknown field {', '.join(map(repr, unknown))}")
    values = {name: _convert(value, hints[name], f"{cls.__name__}.{name}") for name, value in data.items()}
    try:
        return cls(**values, **ready)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


def _plain(value):
    if isinstance(value, Config):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


_type_hints = functools.cache(typing.get_type_hints)  # it compiles every annotation


def _convert(value, hint, where: str):
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            check(type(None) in typing.get_args(hint), f"{where}: null is not allowed")
            return None
        return _convert(value, next(a for a in typing.get_args(hint) if a is not type(None)), where)
    if origin is tuple:
        check(isinstance(value, (list, tuple)), f"{where}: expected a list, got {type(value).__name__}")
        return tuple(_convert(item, typing.get_args(hint)[0], where) for item in value)
    if isinstance(hint, type) and issubclass(hint, Config):
        return hint.from_dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    check(
        isinstance(value, hint) and (hint is bool or not isinstance(value, bool)),
        f"{where}: expected {hint.__name__}, got {value!r}",
    )
    if hint is float:
        check(math.isfinite(value), f"{where}: {value} is not finite")
    return value
