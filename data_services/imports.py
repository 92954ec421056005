"""What a recipe names by import path, `package.module:Name`: a source, a loss, a tower."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_services.schema import UsageError


def import_object(path: str, key: str) -> Callable[..., Any]:
    """The function or class at `path`; the working directory comes first.

    Raises UsageError that begins with `key`, which named it, and says what isn't there, and the nearest that is.
    """
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise UsageError(f"{key} is {path!r}: write an import path as package.module:Name")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{key}: no module {error.name!r}, needed for {path!r}; is it installed, or in {here}?"
        ) from error
    except ImportError as error:
        raise UsageError(f"{key}: can't import {module_name!r}: {error}") from error
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, dir(module), 1)
        raise UsageError(
            f"{key}: module {module_name!r} has no {name!r}" + (f"; did you mean {close[0]}?" if close else "")
        )
    found = getattr(module, name)
    if not callable(found):
        raise UsageError(f"{key}: {path!r} is a {type(found).__name__}, not a function or class")
    return found
