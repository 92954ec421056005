"""The corpus every installation has: the documented functions and classes of its own standard library.

A pair is the first paragraph of a docstring (the query) and the source of the function or class without that
docstring (the positive). Whole modules are held out, so a query of one split never meets a neighbour of its
function in another, and a source text that occurs in two splits is kept on the evaluation side only.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

STDLIB_CODE = "stdlib-code"
# In the order in which a text that occurs in several is awarded to one.
SPLITS = ("heldout", "validation", "train")
# Raised when the same interpreter would give other pairs.
CODE_VERSION = 3

MIN_WORDS = 4
NEAR = 10
_HELD_OUT_ONE_IN = 7
_VALIDATION_ONE_IN = 10
_LEFT_OUT = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
}

_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Pair(NamedTuple):
    """`name` is module.qualified_name:line, unique in the corpus."""

    module: str
    name: str
    query: str
    positive: str


@functools.cache
def stdlib_files() -> tuple[tuple[str, Path], ...]:
    """(module name, file) of the pure-Python standard library without its tests, sorted by module."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            # _sysconfigdata* is written when the interpreter is built: data, not library.
            if not module.startswith("_sysconfigdata"):
                found.append((module, path))
    return tuple(sorted(found))


def stdlib_stamp() -> dict[str, object]:
    """What tells cheaply whether the standard library changed: interpreter, sizes and times of the files."""
    files = hashlib.blake2b(digest_size=16)
    for module, path in stdlib_files():
        status = path.stat()
        files.update(f"{module} {status.st_size} {status.st_mtime_ns}\n".encode())
    return {"python": sys.version, "code_version": CODE_VERSION, "files": files.hexdigest()}


@functools.cache
def stdlib_code() -> dict[str, tuple[Pair, ...]]:
    """The pairs of each of `SPLITS`, sorted by module and line; pure of everything but the interpreter."""
    by_module = {module: tuple(module_pairs(module, path)) for module, path in stdlib_files()}
    splits = split_modules([module for module, pairs in by_module.items() if pairs])
    taken: set[str] = set()
    kept: dict[str, tuple[Pair, ...]] = {}
    for split in SPLITS:
        first: dict[tuple[str, str], Pair] = {}
        for module in splits[split]:
            for pair in by_module[module]:
                first.setdefault((pair.query, pair.positive), pair)
        kept[split] = tuple(p for p in first.values() if p.positive not in taken and p.query not in taken)
        taken.update(text for pair in kept[split] for text in (pair.query, pair.positive))
    return kept


def rows(split: str) -> Iterator[dict[str, Any]]:
    """The pairs of a split as rows of a source, with their package and what stands near them."""
    pairs = stdlib_code()[split]
    for place, pair in enumerate(pairs):
        package = pair.module.partition(".")[0]
        own = {"name": pair.name, "package": package, "query": pair.query, "positive": pair.positive}
        yield own | {"nearby": nearby(pairs, place)}


def nearby(pairs: Sequence[Pair], place: int) -> list[str]:
    """The sources of the 2 · NEAR pairs around one, of its own module mostly; those that answer its query are none."""
    own, around = pairs[place], pairs[max(0, place - NEAR) : place + NEAR + 1]
    return list(dict.fromkeys(p.positive for p in around if p.query != own.query and p.positive != own.positive))


def split_modules(modules: list[str]) -> dict[str, list[str]]:
    """Of the sorted modules every seventh is held out, every tenth of the rest is for validation."""
    modules = sorted(modules)
    rest = [module for i, module in enumerate(modules) if i % _HELD_OUT_ONE_IN]
    return {
        "heldout": modules[::_HELD_OUT_ONE_IN],
        "validation": rest[::_VALIDATION_ONE_IN],
        "train": [module for i, module in enumerate(rest) if i % _VALIDATION_ONE_IN],
    }


def module_pairs(module: str, path: Path) -> Iterator[Pair]:
    """The documented functions and classes of one file, in the order of their lines.

    Definitions nested in classes count, those nested in functions don't. A file that the interpreter itself
    can't parse gives nothing.
    """
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):
        return
    # ast counts lines by newline only and columns in bytes of UTF-8.
    lines = [line.encode() for line in text.split("\n")]
    for node, qualified_name in _definitions(tree, ""):
        docstring = ast.get_docstring(node)
        if docstring is not None and len(docstring.split()) >= MIN_WORDS:
            query = " ".join(_PARAGRAPH_END.split(docstring.strip())[0].split())
            positive = source_without_docstrings(lines, node)
            yield Pair(module, f"{module}.{qualified_name}:{node.lineno}", query, positive)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[Documented, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Documented):
            yield child, prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child, prefix)


def source_without_docstrings(lines: list[bytes], node: Documented) -> str:
    """The source of a definition, decorators included and dedented, without its docstring.

    The docstrings of what is nested in it go too: a class would otherwise hold its methods' queries word for word.
    lines: the file's lines in UTF-8, without their newlines.
    """
    assert node.end_lineno is not None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = lines[: node.end_lineno]
    documented = [n for n in ast.walk(node) if isinstance(n, Documented) and ast.get_docstring(n) is not None]
    for inner in sorted(documented, key=lambda n: n.body[0].lineno, reverse=True):
        _remove_docstring(kept, inner)
    indent = lines[first - 1][: node.col_offset]
    return b"\n".join(line.removeprefix(indent) for line in kept[first - 1 :]).decode()


def _remove_docstring(lines: list[bytes], node: Documented) -> None:
    """Takes the docstring of `node` out of its file's lines, in place; a body with nothing else becomes `...`."""
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    first, end = docstring.lineno - 1, docstring.end_lineno
    before = lines[first][: docstring.col_offset]
    after = lines[end - 1][docstring.end_col_offset :].strip().removeprefix(b";").lstrip()
    if len(node.body) == 1:
        lines[first:end] = [before + b"..."]
    elif before.strip() or after:
        # The docstring shares its line with the signature, a comment or another statement.
        lines[first:end] = [before + after]
    else:
        while end < len(lines) and not lines[end].strip():
            end += 1
        del lines[first:end]
