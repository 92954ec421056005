"""SUITE as a command names it, with its data: a YAML file, a built-in suite, or a source as one retrieval task."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.evidence.suite_tasks import open_task
from cluster.recipe_file import read_yaml
from cluster.sections import parse_section
from data_services.schema import UsageError
from evaluation.suite import KINDS, RetrievalSection, Suite, TaskSection, nearest
from evaluation.vectors import Variant

if TYPE_CHECKING:
    from evaluation.tasks.base import Task

BUILTIN = "builtin:"
_SHIPPED = Path(__file__).resolve().parents[2] / "evaluation" / "suites"


@dataclass(frozen=True)
class OpenSuite:
    """A suite with its data. Equal fingerprints: equal tasks, texts, judgements and metrics."""

    name: str
    tasks: tuple[Task, ...]
    variants: tuple[Variant, ...] = ()
    bias: bool = False

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(
            json.dumps([task.fingerprint() for task in self.tasks]).encode(), digest_size=16
        ).hexdigest()


def open_suite(named: str, split: str | None, k: int | None, home: Path) -> OpenSuite:
    """split, k: of a source that is named as a suite; a suite's own file says these things itself.

    Raises UsageError for a suite, kind, metric, source or field that isn't there, with the nearest that is.
    """
    if named.endswith((".yaml", ".yml")) or is_shipped(named):
        if split is not None or k is not None:
            told = "--split" if split is not None else "--k"
            raise UsageError(f"{told} is for a source; a suite's file has `split` and `metrics` of its own")
        suite = read_suite(_SHIPPED / f"{named.removeprefix(BUILTIN)}.yaml" if is_shipped(named) else Path(named))
    else:
        suite = _of_source(named, split, k or 10)
    tasks = tuple(open_task(task, home) for task in suite.tasks)
    return OpenSuite(suite.name, tasks, tuple(suite.variants), suite.bias)


def shipped() -> list[str]:
    """The suites that need no download."""
    return sorted(f"{BUILTIN}{path.stem}" for path in _SHIPPED.glob("*.yaml"))


def is_shipped(named: str) -> bool:
    return named in shipped()


def read_suite(path: Path) -> Suite:
    """The suite in a YAML file. UsageError with the file, the task and the key."""
    return parse_suite(read_yaml(path), str(path))


def parse_suite(values: Mapping[str, Any], where: str) -> Suite:
    """`values` as a Suite; errors name `where` it is from, and the task."""
    made = dict(values)
    for key, parse in (("tasks", _parse_task), ("variants", _parse_variant)):
        if isinstance(made.get(key), list):
            made[key] = [parse(item, where, i) for i, item in enumerate(made[key])]
    return parse_section(Suite, made, where)


def _parse_task(task: Any, where: str, number: int) -> TaskSection:
    if not isinstance(task, dict):
        raise UsageError(f"{where}: tasks.{number} is {task!r}: it should have keys of its own, name and kind first")
    where = f"{where}: task {task.get('name', number)}"
    if task.get("kind") not in KINDS:
        raise UsageError(f"{where}: {nearest('kind', str(task.get('kind', '')), tuple(KINDS))}")
    return parse_section(KINDS[task["kind"]], task, where)


def _parse_variant(variant: Any, where: str, number: int) -> Variant:
    if not isinstance(variant, dict):
        raise UsageError(f"{where}: variants.{number} is {variant!r}: it should have dim, quantise or prompts")
    return parse_section(Variant, variant, f"{where}: variants.{number}")


def _of_source(path: str, split: str | None, k: int) -> Suite:
    from evaluation.metrics import metric_names

    if path.startswith(BUILTIN):
        from data_services.corpora.catalogue import corpora

        known = [*(f"{BUILTIN}{name}" for name in corpora()), *shipped()]
        if path not in known:
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)[0]
            raise UsageError(f"no built-in suite or source {path}: did you mean {near}? There are {', '.join(known)}")
        split = split or "heldout"
    task = RetrievalSection(
        kind="retrieval", name=split or "pool", data=path, split=split, metrics=list(metric_names(k))
    )
    return Suite(name=_as_name(path), tasks=[task])


def _as_name(path: str) -> str:
    kept = "".join(c if c.isalnum() or c in "_.-" else "-" for c in Path(path).name)
    return kept.strip("-.")[:100] or "source"
