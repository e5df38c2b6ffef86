"""Settings as frozen dataclasses: read, checked, overridden and written in TOML or JSON."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_type_hints

from fusion_core.atomic import PathLike, atomic_write
from fusion_core.errors import LARGEST, ConfigError, FusionError, check_range, reading

_SHOWN = 120  # letters of a value in a complaint


@functools.cache
def _adapter(cls: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _plain(cls: type, value: Any) -> Any:
    from pydantic_core import PydanticSerializationError

    try:
        return _adapter(cls).dump_python(value, mode="json", warnings=False)
    except PydanticSerializationError as error:
        raise ConfigError(f"settings take plain values: {error}") from error


def _settings_at(cls: Any, location: Sequence[Any]) -> list[str]:
    for part in location:
        hint = get_type_hints(cls).get(part)
        cls = next((c for c in (hint, *get_args(hint)) if dataclasses.is_dataclass(c)), cls)
    return [field.name for field in dataclasses.fields(cls)]


def _complaint(cls: type, error: Mapping[str, Any]) -> ConfigError:
    location = list(error["loc"])
    key = ".".join(map(str, location))
    if error["type"] == "unexpected_keyword_argument":
        return _unknown(key, _settings_at(cls, location[:-1]))
    if error["type"] == "missing":
        return ConfigError(f"setting {key!r} is missing")
    reason = error.get("ctx", {}).get("error")
    if isinstance(reason, FusionError):
        return ConfigError(str(reason))
    if reason is not None:
        return ConfigError(f"setting {key!r}: {reason}" if key else str(reason))
    wanted = str(error["msg"]).removeprefix("Input should be ")
    what = f"setting {key!r} is" if key else "settings are"
    shown = repr(error["input"])
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."  # it may be a broken file
    return ConfigError(f"{what} {shown}, wanted {wanted if key else 'names with values'}")


def _unknown(key: str, known: list[str]) -> ConfigError:
    parent, _, last = key.rpartition(".")
    near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
    names = [f"{parent}.{name}" if parent else name for name in near or known]
    return ConfigError(
        f"unknown setting {key!r}; " + ("did you mean " if near else "there are ") + ", ".join(names)
    )


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


class Config:
    """Mixin for a frozen dataclass of plain values (nested dataclasses included).

    Values are checked when they come from outside (:meth:`from_dict`, :meth:`load`, :meth:`override`,
    :meth:`replace`): unknown names and wrong types are refused, an int is taken for a float.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Train(Config):
        ...     lr: float = 0.1
        ...     steps: int = 100
        >>> Train.from_dict({"steps": 5}).override(["lr=0.5"])
        Train(lr=0.5, steps=5)
        >>> Train.from_dict({"step": 5})
        Traceback (most recent call last):
        fusion_core.errors.ConfigError: unknown setting 'step'; did you mean steps
    """

    __slots__ = ()
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The settings of a dictionary; what it does not name keeps its default.

        Raises:
            ConfigError: an unknown name (the nearest is named), a wrong type, or a value that the class
                refuses.
        """
        from pydantic import ValidationError

        try:
            # As JSON, strictly: "3" is no int, but a list is a tuple and text is a path or an enum member.
            return _adapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            raise _complaint(cls, error.errors()[0]) from error
        except (TypeError, ValueError, RecursionError, OverflowError) as error:
            raise ConfigError(f"settings take plain values: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values: dictionaries, lists, text, numbers, booleans, None.

        Raises:
            ConfigError: a field holds something else.
        """
        return _plain(type(self), self)

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Read a ``.toml`` or ``.json`` file.

        Raises:
            ConfigError: missing, not in the format, or as in :meth:`from_dict`; the file is named.
        """
        file = Path(path)
        form = _format(file)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
        with reading(path, f"is not {form[1:].upper()}", ConfigError):
            text = data.decode("utf-8")
            found = tomllib.loads(text) if form == ".toml" else json.loads(text)
        try:
            return cls.from_dict(found)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def save(self, path: PathLike) -> None:
        """Write a ``.toml`` or ``.json`` file, whole or not at all; TOML leaves out what is None.

        Raises:
            ConfigError: another suffix, or a value that the format cannot say.
        """
        data = self.to_dict()
        if _format(Path(path)) == ".toml":
            import tomli_w

            plain = _without_none(data)
            if type(self).from_dict(plain).to_dict() != data:
                raise ConfigError(f"{path}: TOML has no None, and its default here is another; save as .json")
            text = tomli_w.dumps(plain)
        else:
            try:
                text = json.dumps(data, indent=2, allow_nan=False) + "\n"
            except ValueError as error:
                raise ConfigError(f"{path}: JSON has no infinity and no NaN; save as .toml") from error
        with atomic_write(path, "w") as file:
            file.write(text)

    def check_fields(
        self,
        *names: str,
        low: float = 0.0,
        high: float = LARGEST,
        open: bool = False,  # noqa: A002
    ) -> None:
        """Check that fields lie in [low, high], or in (low, high) with ``open=True``; what is None passes.

        Args:
            *names: of fields that hold a number, or several.
            low: least.
            high: most.
            open: the ends are outside.

        Raises:
            ConfigError: a number is outside; its field is named.
        """
        for name in names:
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None:
                    check_range(name, number, low, high, open=open)

    def override(self, assignments: Sequence[str]) -> Self:
        """The settings with some set anew, as ``--set train.lr=0.1`` does.

        Args:
            assignments: ``"name=value"`` or ``"part.name=value"``; a value is read as TOML, and as text where
                it is none.

        Raises:
            ConfigError: no ``=``, or as in :meth:`from_dict`.
        """
        data = self.to_dict()
        for assignment in assignments:
            key, equals, text = (word.strip() for word in assignment.partition("="))
            if not key or not equals:
                raise ConfigError(f"{assignment!r} sets nothing, wanted name=value")
            *parents, last = key.split(".")
            node: Any = data
            for parent in parents:
                if node.get(parent) is None:
                    node[parent] = {}
                node = node[parent]
                if not isinstance(node, dict):
                    raise ConfigError(f"{key!r} cannot be set: {parent!r} is {node!r} and has no parts")
            node[last] = _value(text)
        return self.from_dict(data)

    def replace(self, **changes: Any) -> Self:
        """The settings with some fields set anew, checked as in :meth:`from_dict`.

        Raises:
            ConfigError: an unknown name or a wrong type.
        """
        known = [field.name for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        if wrong := next((name for name in changes if name not in known), None):
            raise _unknown(wrong, known)
        plain = {name: _plain(object, value) for name, value in changes.items()}
        return self.from_dict({**self.to_dict(), **plain})


def _format(path: Path) -> str:
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path} has suffix {path.suffix!r}, wanted .toml or .json")
    return path.suffix


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
        return json.loads(json.dumps(found["value"])) if len(found) == 1 else text
    except (ValueError, TypeError, RecursionError):  # no TOML, or a date
        return text
