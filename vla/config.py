"""YAML plus `a.b=c` overrides -> frozen pydantic models, or one error that names every line and the nearest key.

Types live beside what they configure (`MixtureConfig` in `vla/mixture/config.py`, ...); this file only reads and checks. Files
hold values and nothing else: no code paths, no interpolation, no tags (`yaml.safe_load`).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vla.errors import UsageError

_INSTALLED = Path(__file__).parent / "configs"
CONFIGS = _INSTALLED if _INSTALLED.exists() else Path(__file__).parent.parent / "configs"
"""Where shipped YAML lies: inside the wheel, or beside `vla/` in a checkout."""


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused, NaN refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


C = TypeVar("C", bound=Config)

_MOST_BYTES, _MOST_NODES = 2**20, 100_000
"""Of one YAML file, aliases written out: a dozen lines of aliases of aliases can stand for more values than memory holds."""


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...], model: type[C]) -> C:
    """Read `path` (a file, or a shipped name such as `train/demo`), apply `a.b=c` overrides, validate as `model`.

    Raises `UsageError` listing every problem with its line number and, for unknown keys, the nearest known one.
    """
    file = find_config(path)
    try:
        if (size := file.stat().st_size) > _MOST_BYTES:
            raise yaml.YAMLError(f"{size:,} bytes; at most {_MOST_BYTES:,}")
        text = file.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if (nodes := _written_out(tree, {})) > _MOST_NODES:
            raise yaml.YAMLError(f"aliases that stand for {nodes:,} values; at most {_MOST_NODES:,}")
        values = yaml.safe_load(text)
        lines = _line_numbers(tree)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(file, found=" ".join(str(error).split()), expected="valid YAML",
                         fix="correct the line named above") from error  # fmt: skip
    if not isinstance(values, dict):
        raise UsageError(file, found=type(values).__name__, expected="a mapping of keys to values", fix=f"edit {file}")
    for override in overrides:
        lines[_apply(values, override)] = 0
    return validate(values, model, str(file), lines)


def find_config(path: str | Path) -> Path:
    """The file meant by `path`; raises `UsageError` with the nearest shipped names when there is none."""
    path = Path(path)
    for candidate in (path, CONFIGS / path, (CONFIGS / path).with_suffix(".yaml")):
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml"))
    near = difflib.get_close_matches(str(path).removeprefix("configs/").removesuffix(".yaml"), known, n=3, cutoff=0.3)
    raise UsageError(path, found="no such file", expected="a YAML file or a shipped config",
                     fix=f"use one of {near or known}")  # fmt: skip


def validate(values: dict, model: type[C], where: str, lines: dict[tuple, int] | None = None) -> C:
    """`model.model_validate(values)` with the house's error."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = lines or {}
        problems = [_problem(item, values, model, where, lines) for item in error.errors()]
        found = "\n            ".join(dict.fromkeys(found for found, _ in problems))
        expected = "\n            ".join(dict.fromkeys(expected for _, expected in problems))
        raise UsageError(where, found=found, expected=expected,
                         fix="correct the keys named above and run again") from error  # fmt: skip


def _problem(item: Any, values: dict, model: type[BaseModel], where: str, lines: dict[tuple, int]) -> tuple[str, str]:
    loc = _written(item["loc"], values, item["type"] == "missing")

    def place(at: tuple) -> str:
        dotted = ".".join(map(str, at))
        line = next((lines[at[:k]] for k in range(len(at), 0, -1) if at[:k] in lines), None)
        return f"{dotted} (the override)" if line == 0 else f"{where}:{line}: {dotted}" if line else dotted or where

    if item["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, loc[:-1]))
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {known}"
        return f"{place(loc)}: no such key", hint
    if item["type"] == "missing":
        return f"{place(loc)}: missing", f"a value for {loc[-1]!r}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and isinstance(item["input"], dict):  # a whole part of the config, or all of it
        named = _named(item["input"], set(re.findall(r"\w+(?:\.\w+)*", message)))
        said = [f"{place((*loc, *at))}: {', '.join(map(str, value))}" if isinstance(value, dict) else
                f"{place((*loc, *at))} = {value!r}" for at, value in named]  # fmt: skip
        return "\n            ".join(said) or place(loc), message
    return f"{place(loc)} = {item['input']!r}", message


def _written(loc: tuple, values: Any, missing: bool) -> tuple:
    """`loc` without what no file says: names pydantic gives to the members of unions and to functions."""
    out = []
    for k, part in enumerate(loc):
        if isinstance(values, dict) and part in values or isinstance(values, list) and isinstance(part, int):
            values = values[part]
            out.append(part)
        elif missing and k == len(loc) - 1:
            out.append(part)
    return tuple(out)


def _named(values: dict, words: set[str], at: tuple = ()) -> list[tuple[tuple, Any]]:
    """(path, value) of the keys that a message of these `words` is about: said in full, or by their last name where the part they
    lie in is named as well."""
    found: list[tuple[tuple, Any]] = []
    for key, value in values.items():
        path = (*at, key)
        inner = _named(value, words, path) if isinstance(value, dict) else []
        here = ".".join(map(str, path)) in words or (str(key) in words and ".".join(map(str, at)) in words)
        found += inner or ([(path, value)] if here else [])
    return found


def _fields_at(model: type[BaseModel], loc: tuple) -> set[str]:
    """Field names of the model reached by walking `loc`, through optionals, lists and dicts."""
    kinds: list[Any] = [model]
    for part in loc:
        if isinstance(part, int):  # a list position: its element types are already in `kinds`
            continue
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        kinds = [k for model_ in models if part in model_.model_fields for k in _unpack(model_.model_fields[part].annotation)]
    return {name for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel) for name in kind.model_fields}


def _unpack(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [kind for argument in arguments for kind in _unpack(argument)] if arguments else [annotation]


def _apply(values: dict, override: str) -> tuple:
    key, sign, raw = override.partition("=")
    if not sign or not key:
        raise UsageError(f"override {override!r}", found=override, expected="a.b=value", fix="e.g. optim.lr=3e-4")
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    at: Any = values
    try:
        for part in parents:
            at = at[part] if isinstance(at, list) else at.setdefault(part, {})  # pyright: ignore
        at[last] = _value(raw)
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        raise UsageError(f"override {override!r}", found=f"{key} does not lead to a mapping",
                         expected="a path of keys, list positions as numbers",
                         fix="e.g. mixture.datasets.0.weight=2") from error  # fmt: skip
    return (*parents, last)


def _value(raw: str) -> Any:
    try:
        value = yaml.safe_load(raw) if raw else ""
    except yaml.YAMLError:
        return raw  # text that is no YAML is text
    if isinstance(value, str):  # YAML 1.1 reads 3e-4 as text; people mean a number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _written_out(node: Any, known: dict[int, int]) -> int:
    """How many nodes `node` would be with every alias written out; each is counted once, so this is quick."""
    if id(node) in known:
        if known[id(node)] < 0:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an alias of itself")
        return known[id(node)]
    known[id(node)] = -1
    inside = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else \
        node.value if isinstance(node, yaml.SequenceNode) else ()  # fmt: skip
    known[id(node)] = 1 + sum(_written_out(child, known) for child in inside)
    return known[id(node)]


def _line_numbers(node: Any, at: tuple = ()) -> dict[tuple, int]:
    lines: dict[tuple, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*at, key.value)
            if path in lines:
                name = ".".join(map(str, path))
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {name} a second time (first in line {lines[path]})")
            lines[path] = key.start_mark.line + 1
            lines |= _line_numbers(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            lines |= _line_numbers(value, (*at, index))
    return lines


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, in field order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def flatten(values: object, at: str = "") -> dict[str, object]:
    """Nested values as `{"a.b.0": value}`, the way overrides name them."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None:
        return {at: values}
    return {k: v for key, value in items for k, v in flatten(value, f"{at}.{key}" if at else str(key)).items()}
