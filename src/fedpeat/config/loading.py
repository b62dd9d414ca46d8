"""Settings from YAML: strict about names and types, with a suggestion for a typo."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from fedpeat.config.schema import ComparisonPlan, Config, Method
from fedpeat.core.errors import ConfigError

__all__ = [
    "config_from_dict",
    "config_to_dict",
    "config_to_yaml",
    "differences",
    "load_config",
    "load_plan",
    "override",
    "setting_types",
]

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(
                    problem=problem, problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def load_config(path: str | Path) -> Config:
    """Read a YAML file of settings; fields that it does not name keep their defaults.

    A part named "compare" belongs to ``load_plan`` and is passed over.

    Raises:
        ConfigError: If the file is missing, is not YAML, or holds an unknown key or a value that is
            not allowed.
    """
    data = {key: value for key, value in _read_mapping(path).items() if key != "compare"}
    try:
        return config_from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_dict(data: object) -> Config:
    """Return the settings that a nested mapping describes.

    Raises:
        ConfigError: If a key is unknown or a value is not allowed.
    """
    return _build(Config, data, prefix="")


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the settings as a nested mapping of plain data."""
    return dataclasses.asdict(config)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by their dotted names: (old, new)."""
    before, after = _flat(config_to_dict(old)), _flat(config_to_dict(new))
    return {name: (before[name], after[name]) for name in after if before[name] != after[name]}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        own = (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
        flat |= own
    return flat


def config_to_yaml(config: Config) -> str:
    """Return the settings as YAML that ``load_config`` reads back to an equal Config."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(config_to_dict(config)), sort_keys=False, allow_unicode=True)


def _build(kind: type[T], data: object, prefix: str) -> T:
    settings = _require_mapping(data, prefix.rstrip(".") or "the config")
    hints = get_type_hints(kind)
    for key in settings:
        if key not in hints:
            raise ConfigError(_unknown_key(str(key), list(hints), prefix))
    values = {key: _convert(hints[key], value, prefix + key) for key, value in settings.items()}
    return kind(**values)


def setting_types(kind: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Return the type of every setting by its dotted name, e.g. "local.local_steps"."""
    types_by_name: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        is_part = dataclasses.is_dataclass(hint)
        types_by_name |= (
            setting_types(hint, f"{prefix}{name}.") if is_part else {prefix + name: hint}
        )
    return types_by_name


def _unknown_key(key: str, known: list[str], prefix: str) -> str:
    """Say what was meant: a name much like it, the same name in another part, or one like it."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    elsewhere = [name for name in setting_types() if name.endswith("." + key)]
    far = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    meant = [prefix + name for name in near] + elsewhere + [prefix + name for name in far]
    hint = f"did you mean {meant[0]}?" if meant else f"allowed: {', '.join(known)}"
    return f"unknown config key {prefix}{key}; {hint}"


def _convert(hint: Any, value: object, name: str) -> Any:
    """Check a YAML value against a field's type; an int becomes a float, nothing else is bent."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value if value is not None else {}, name + ".")  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, name)
    if origin in (Mapping, Literal):
        is_choice = origin is Literal
        return _convert_literal(args, value, name) if is_choice else _require_mapping(value, name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    return _convert_scalar(hint, value, name)


def _convert_literal(allowed: tuple[Any, ...], value: object, name: str) -> Any:
    if value in allowed:
        return value
    close = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}{hint}")


def _convert_scalar(kind: type, value: object, name: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and (is_number or isinstance(value, str)):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)  # type: ignore[arg-type]
    if type(value) is kind:
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise ConfigError(f"{name} must be {names.get(kind, kind.__name__)}, got {value!r}")


def load_plan(
    path: str | Path, *, methods: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> ComparisonPlan:
    """Read what a comparison runs from the "compare" part of a YAML file.

    Args:
        path: The file.
        methods: Methods to run instead of the file's.
        seeds: Seeds to run instead of the file's.

    Raises:
        ConfigError: If the part has an unknown key or method, or an override that is not a setting.
    """
    part = _read_mapping(path).get("compare")
    given = {
        key: list(value)
        for key, value in {"methods": methods, "seeds": seeds}.items()
        if value is not None
    }
    try:
        merged = dict(_require_mapping({} if part is None else part, "compare")) | given
        config = load_config(path)
        methods = list(get_args(Method))
        overrides = _part(merged, "overrides")
        for method in overrides:
            if method not in methods:
                raise ConfigError(_unknown_key(str(method), methods, "compare.overrides."))
        variants = _part(merged, "variants")
        _check_changes(config, overrides, "compare.overrides")
        _check_changes(config, variants, "compare.variants")
        named = {str(name): own for name, own in variants.items()}
        if isinstance(merged.get("methods"), list):
            for place, method in enumerate(merged["methods"]):
                _convert_literal((*methods, *named), method, f"compare.methods[{place}]")
        merged |= {"overrides": overrides, "variants": named}
        return _build(ComparisonPlan, merged, prefix="compare.")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _part(plan: Mapping[str, Any], name: str) -> Mapping[Any, Any]:
    part = plan.get(name)
    return _require_mapping({} if part is None else part, f"compare.{name}")


def _check_changes(config: Config, changes: Mapping[Any, Any], place: str) -> None:
    """Check each method's settings now, and not hours later when its turn comes."""
    for name, own in changes.items():
        try:
            override(config, _require_mapping(own, "an override"))
        except ConfigError as error:
            raise ConfigError(f"{place}.{name}: {error}") from error


def _require_mapping(data: object, name: str) -> Mapping[Any, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name} must be a mapping, got {data!r}")
    return data


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return the settings with a nested mapping of changes applied.

    Raises:
        ConfigError: If a key is unknown or a value is not allowed.
    """

    def merge(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        merged = dict(base)
        for key, value in new.items():
            both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
            merged[key] = merge(base[key], value) if both else value
        return merged

    return config_from_dict(merge(config_to_dict(config), changes))


def _read_mapping(path: str | Path) -> Mapping[Any, Any]:
    try:
        data = _Loader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError as error:
        raise ConfigError(f"no such config file: {path}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} must be UTF-8 text, got: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-45: a ValueError
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} must hold settings by name, got {type(data).__name__}")
    return data
