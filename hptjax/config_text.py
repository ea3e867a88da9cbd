"""Plain values into typed, frozen dataclasses, with errors that name the field, what it takes and what came."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import tyro

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], *, source: str, root: type | None = None, place: str = "") -> T:
    """An instance of a dataclass from nested plain values; fields left out keep their defaults.

    Args
      source: the file that the values come from, for messages.
      root: the dataclass whose dotted paths are candidates for the nearest key; `cls` where it is None.
      place: dotted path of `cls` within `root`.

    Raises
      ValueError: an unknown key (the message names the nearest one), a missing field, a value of another type.
    """
    root = root or cls
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        path = f"{place}.{key}" if place else key
        if key not in fields:
            section = f"section [{place}]" if place else "the top level"
            raise ValueError(
                f"{source}: unknown key '{key}' in {section}; the nearest key is '{nearest_key(root, path)}'."
            )
        arguments[key] = convert(hints[key], value, source=source, root=root, path=path)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ValueError(f"{source}: '{place}' needs the key '{name}' ({describe(hints[name])}); it is missing.")
    return cls(**arguments)


def convert(hint: Any, value: Any, *, source: str, root: type, path: str) -> Any:
    """`value` as the type `hint`: whole numbers become floats and lists become tuples; nothing else is converted."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, source=source, root=root, place=path)
    if origin is types.UnionType or origin is typing.Union:
        if value is None:
            return None
        (hint,) = (option for option in options if option is not types.NoneType)
        return convert(hint, value, source=source, root=root, path=path)
    if origin is Literal and value in options and type(value) in {type(option) for option in options}:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(
            convert(options[0], item, source=source, root=root, path=f"{path}.{i}") for i, item in enumerate(value)
        )
    if hint is float and type(value) is int:
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise ValueError(f"{source}: '{path}' takes {describe(hint)}, got {type(value).__name__} {json_text(value)}.")


def describe(hint: Any) -> str:
    """A type in words."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        names = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"a section with keys {names}"
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(option) for option in options)
    if origin is tuple:
        return f"a list, each entry {describe(options[0])}"
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join(describe(option) for option in options if option is not types.NoneType) + " (or left out)"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return words.get(hint, str(hint))


def json_text(value: Any) -> str:
    """A value as a file would show it."""
    return json.dumps(value, default=str)


def nearest_key(root: type, path: str) -> str:
    """The dotted path of `root` that is most like `path`: by its last part first, then by its section."""
    section, _, leaf = path.rpartition(".")

    def likeness(candidate: str) -> float:
        candidate_section, _, candidate_leaf = candidate.rpartition(".")
        of_leaf = difflib.SequenceMatcher(None, leaf.lower(), candidate_leaf.lower()).ratio()
        of_section = difflib.SequenceMatcher(None, section.lower(), candidate_section.lower()).ratio()
        return of_leaf + 0.25 * of_section

    return max(dotted_paths(root), key=likeness)


def dotted_paths(cls: type, prefix: str = "") -> list[str]:
    """Every path that can be set: sections and fields."""
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        paths.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            paths += dotted_paths(typing.cast(type, hint), f"{prefix}{name}.")
    return paths


def command_line(default: T, arguments: Sequence[str], *, prog: str) -> T:
    """`default` with the fields that the command line sets; prints help or a complaint and exits where it must."""
    return tyro.cli(
        type(default),
        default=default,
        args=list(arguments),
        prog=prog,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
        registry=_registry(),
    )


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Booleans as TOML writes them, in any case."""
    registry = tyro.constructors.ConstructorRegistry()
    words = {"true": True, "false": False}

    def read(arguments: list[str]) -> bool:
        if arguments[0].lower() not in words:
            raise ValueError(f"takes true or false, got {arguments[0]}")
        return words[arguments[0].lower()]

    @registry.primitive_rule
    def boolean(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type is not bool:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{true,false}",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, bool),
            str_from_instance=lambda value: [str(value).lower()],
        )

    return registry


def struct_list(entry: type) -> Any:
    """How a list of small structs is set on the command line: as a TOML list, `'[{method = "sft", steps = 10}]'`."""

    def read(arguments: list[str]) -> tuple[Any, ...]:
        try:
            values = tomllib.loads(f"value = {arguments[0]}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"takes a TOML list such as {example}, got {arguments[0]}: {error}") from None
        return convert(tuple[entry, ...], values, source="command line", root=entry, path="entry")  # type: ignore[valid-type]

    def write(entries: tuple[Any, ...]) -> list[str]:
        return ["[" + ", ".join(inline_table(dataclasses.asdict(item)) for item in entries) + "]"]

    example = "[{" + ", ".join(f"{field.name} = ..." for field in dataclasses.fields(entry)) + "}]"
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=example,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=write,
    )


def inline_table(values: Mapping[str, Any]) -> str:
    """A mapping as a TOML inline table; None is left out."""
    return "{" + ", ".join(f"{key} = {toml_value(value)}" for key, value in values.items() if value is not None) + "}"


def toml_value(value: Any) -> str:
    """A value as TOML writes it: JSON, but for tables."""
    if isinstance(value, Mapping):
        return inline_table(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(entry) for entry in value) + "]"
    return json.dumps(value)


def toml_text(values: Mapping[str, Any]) -> str:
    """A config file with these fields: the single ones, then a section for each mapping; None is left out."""
    sections = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    single = {name: value for name, value in values.items() if name not in sections}
    parts = [_assignments(single), *(f"[{name}]\n" + _assignments(section) for name, section in sections.items())]
    return "\n".join(part for part in parts if part)


def _assignments(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in values.items() if value is not None)
