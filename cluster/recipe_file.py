"""YAML as a recipe needs it: read safely, no key twice, bounded in size, with overrides of single keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_services.schema import UsageError

MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # after aliases are expanded: nine lines of aliases can stand for a billion


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would settle silently for the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises UsageError with file and line: missing, not UTF-8, not YAML, a key twice, too large, no mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: larger than {MAX_BYTES // 1000} kB, which no recipe is")
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file{_beside(path)}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    value = _parse(text, str(path))
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a recipe is a mapping of sections, this is {type(value).__name__}")
    return value


def _beside(path: Path) -> str:
    """The recipes that are there, for a name that isn't."""
    folder = path.parent if path.parent.name and path.parent.is_dir() else Path("recipes")
    names = sorted(str(p) for p in folder.glob("*.yaml"))[:8]
    return f"; there are {', '.join(names)}" if names else ""


def _parse(text: str, where: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > MAX_NODES:
            raise UsageError(f"{where}: more than {MAX_NODES} values once its aliases are expanded")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{where}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # an impossible date, a control character
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UsageError(f"{where}: nested too deep") from None
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values under `node` with aliases expanded; an alias to its own parent is an error."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if (known := sizes.get(id(node))) is not None:
        if known < 0:
            raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark)
        return known
    sizes[id(node)] = -1
    inner = (pair[1] for pair in node.value) if isinstance(node, yaml.MappingNode) else iter(node.value)
    sizes[id(node)] = 1 + sum(_expanded(n, sizes) for n in inner)
    return sizes[id(node)]


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Sets each `key.path=value` in `raw`, making sections that aren't there; returns the dotted keys.

    A number in the path is a position in a list that exists. Raises UsageError naming the argument.
    """
    return [_override(raw, argument) for argument in overrides]


def _override(raw: dict[str, Any], argument: str) -> str:
    key, equals, text = argument.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UsageError(f"{argument!r} is no override: write key.path=value")
    set_key(raw, key, _parse(text, f"command line, {key}"), repr(argument))
    return key


def set_key(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets one dotted key as `apply_overrides` does; errors begin with `where`."""
    parts = key.split(".")
    at: Any = raw
    for depth, part in enumerate(parts):
        last, path = depth == len(parts) - 1, ".".join(parts[:depth])
        if isinstance(at, list):
            at = _list_step(at, part, path, where, value if last else None, last)
        elif isinstance(at, dict):
            if last:
                at[part] = value
            else:
                if at.get(part) is None:
                    at[part] = {}
                at = at[part]
        else:
            raise UsageError(f"{where}: {path} is {at!r}, which has no keys")


def _list_step(at: list[Any], part: str, path: str, where: str, value: Any, last: bool) -> Any:
    if not part.isdigit() or int(part) >= len(at):
        raise UsageError(f"{where}: {path} is a list of {len(at)}; give a position from 0 to {len(at) - 1}")
    if last:
        at[int(part)] = value
    return at[int(part)]
