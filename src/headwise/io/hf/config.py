"""The values of a config.json by name, each checked as it is read. What is missing, of another type or asks for what we
lack is a FormatError that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

from headwise.errors import FormatError, one_of, short

T = TypeVar("T")
D = TypeVar("D")
_NEEDED: Any = object()
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "an object",
}
FARTHEST = 10**30  # from zero; no config has numbers beyond


class Config:
    """A config.json, or an object inside one; `where` names it in errors. null counts as absent, as in transformers."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    @overload
    def get(self, name: str, kind: type[T]) -> T: ...
    @overload
    def get(self, name: str, kind: type[T], default: D) -> T | D: ...
    def get(self, name: str, kind: type[Any], default: Any = _NEEDED) -> Any:
        """The value of `name`: bool, str, list, dict, a float (whole numbers too), or an int from 0 on.

        Raises:
            FormatError: it is of another type, or missing and without default.
        """
        value = self.values.get(name)
        if value is None:
            if default is _NEEDED:
                raise FormatError(f"{self.where}: {name!r} is missing")
            return default
        fits = isinstance(value, int | float if kind is float else kind) and (kind is bool) == isinstance(value, bool)
        if fits and kind in (int, float):
            fits = -FARTHEST < value < FARTHEST and (kind is float or value >= 0)
        if not fits:
            raise FormatError(f"{self.where}: {name!r} should be {_WORDS[kind]}, not {short(value)}")
        return float(value) if kind is float else value

    def size(self, name: str, default: Any = _NEEDED, most: int = 2**31) -> Any:
        """A whole number from 1 to `most`; what may be missing has a default."""
        value = self.get(name, int, default)
        if value is not None and not 1 <= value <= most:
            raise FormatError(f"{self.where}: {name!r} should be from 1 to {most}, not {short(value)}")
        return value

    def choice(self, name: str, table: Mapping[str, T], default: str | None = None) -> T:
        """What the value of `name` stands for in `table`; a value that is not there is one that we lack."""
        value = self.get(name, str, default)
        if value is None:
            raise FormatError(f"{self.where}: {name!r} is missing")
        if value not in table:
            raise FormatError(f"{self.where}: {name}: {one_of(value, table, 'value')}")
        return table[value]

    def only(self, name: str, value: Any) -> None:
        """Refuse anything but `value`, which is what an absent `name` means and all that we compute."""
        given = self.values.get(name)
        if given is not None and given != value:
            raise self.lack(f"{name}={short(given)}", f"only {name}={value} is supported")

    def section(self, name: str) -> Config | None:
        """The object under `name`; None where there is none."""
        values = self.get(name, dict, None)
        return None if values is None else Config(values, f"{self.where}: {name}")

    def lack(self, given: str, allowed: str) -> FormatError:
        """The error of a config that asks for what we do not compute."""
        return FormatError(f"{self.where}: it asks for {given}; {allowed}")
