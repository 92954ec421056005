"""Config sections from a command's arguments: a wrong one is a sentence with its key and what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from cluster.recipe_file import apply_overrides
from data_services.schema import Section, UsageError
from data_services.sources import SourceConfig

S = TypeVar("S", bound=Section)


def parse_section(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """The section of these values; UsageError that begins with `where`, which they are from."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = list(kind.model_fields)
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise UsageError(f"{where}: unknown key {key}; {hint}")
    if problem["type"] == "value_error":
        raise UsageError(f"{where}: {key + ': ' if key else ''}{problem['ctx']['error']}")
    raise UsageError(f"{where}: {key} is {problem['input']!r}: {problem['msg'].replace('Input', 'it', 1)}")


def source_section(path: str, overrides: Sequence[str]) -> SourceConfig:
    """A source by its path and `key=value` arguments, the keys of a recipe's `data.sources`."""
    values: dict[str, Any] = {"path": path}
    apply_overrides(values, overrides)
    return parse_section(SourceConfig, values, f"source {path}")
