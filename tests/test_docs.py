"""The documentation says what the code does: every key, metric and file is named, every snippet still works.

`python -m tests.test_docs` writes the tables of docs/recipe.md anew; meanings that no model describes are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from cluster.config import ANY_KEY, Recipe
from trainers.objectives.sections.numbers import Learned, Piece, Pieces, Schedule

TREE = Path(__file__).parents[1]
DOCS = TREE / "docs"
RECIPE = DOCS / "recipe.md"
TOP = "The top level"
TABLE_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
# A table under its heading, with whatever text stands between them.
SECTION = r"(?m)^## {heading}\n(?P<text>(?:(?!## |\|).*\n)*)(?P<table>(?:\|.*\n)*)"
# Sections that stand in the place of a number, wherever one may.
NUMBERS: dict[type, str] = {
    Schedule: "A number that changes over the run",
    Pieces: "A number that changes at once",
    Piece: "One of its pieces",
    Learned: "A number that is learned",
}
WORDS = {"schedule": Schedule, "pieces": Pieces, "learned": Learned}
TYPES = {bool: "true or false", int: "integer", float: "number", str: "text"}
BOUNDS = {
    "gt": "> {}",
    "ge": "≥ {}",
    "lt": "< {}",
    "le": "≤ {}",
    "min_length": "of length ≥ {}",
    "multiple_of": "a multiple of {}",
    "pattern": "like `{}`",
}


# docs/recipe.md: tables made from the models.


def sections(section: type[BaseModel] = Recipe, path: str = "", seen: set[type] | None = None) -> Iterator[Any]:
    """(heading, path of its keys, model) of every section; one that occurs twice stands at its first place."""
    seen = {section} if seen is None else seen
    yield (
        NUMBERS.get(section) or _heading(section, path),
        f"{path}." if path and section not in NUMBERS else "",
        section,
    )
    for name, field in section.model_fields.items():
        for inner in _models(field.annotation):
            if inner not in seen:
                seen.add(inner)
                kinds = (field.annotation, *get_args(field.annotation))
                listed = ".0" if any(get_origin(kind) is list for kind in kinds) else ""
                listed = f".{ANY_KEY}" if get_origin(field.annotation) is dict else listed
                yield from sections(inner, f"{path}.{name}{listed}".lstrip("."), seen)


def _heading(section: type[BaseModel], path: str) -> str:
    """The path, and the kind where the place takes one of several."""
    kind = section.model_fields.get("kind")
    several = path.startswith(("objective", "data.sources", "search.space"))
    of_kind = f", kind: {kind.default}" if kind is not None and several else ""
    return (path.replace(".0", "") or TOP) + of_kind


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def table_of(path: str, section: type[BaseModel], written: dict[str, str]) -> str:
    """The table of a section. A field without a description keeps the meaning that the page gives it."""
    rows = []
    for name, field in section.model_fields.items():
        if name == "kind":  # the heading has it
            continue
        key = path + name
        cells = (f"`{key}`", _type(field), _default(field), field.description or written.get(key, ""))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return TABLE_HEAD + "".join(rows)


def _type(field: Any) -> str:
    bounds = [
        form.format(value)
        for constraint in field.metadata
        for name, form in BOUNDS.items()
        if (value := getattr(constraint, name, None)) is not None
    ]
    plain, *null = _alternatives(field.annotation)
    return " ".join([plain, ", ".join(bounds)]).strip() + "".join(null)


def _alternatives(annotation: Any) -> list[str]:
    """The type in words, and " or null" where that may be."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        words = dict.fromkeys(_alternatives(x)[0] for x in inner if x is not NoneType)
        return [" or ".join(words), *([" or null"] if NoneType in inner else [])]
    if origin is Annotated:
        return _alternatives(inner[0])
    if origin is Literal:
        return [" or ".join(f"`{value}`" for value in inner)]
    if origin is list or (origin is tuple and inner[-1] is Ellipsis):
        (word,) = _alternatives(inner[0])
        return [f"list of {word}" if "`" in word or word.endswith("]") else f"list of {word}s"]
    if origin is tuple and len(set(inner)) > 1:
        return [f"[{', '.join(_alternatives(x)[0] for x in inner)}]"]
    if origin is tuple:
        return [f"{len(inner)} {_alternatives(inner[0])[0]}s"]
    if origin is dict:
        return ["mapping"]
    return [TYPES.get(annotation) or {v: k for k, v in WORDS.items()}.get(annotation, "section")]


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    return f"`{json.dumps(field.default)}`".replace('"', "")


def _found(page: str, heading: str) -> re.Match[str] | None:
    return re.search(SECTION.format(heading=re.escape(heading)), page)


def _meanings(table: str) -> dict[str, str]:
    rows = re.findall(r"(?m)^\| `([^`]+)` \|.* \| (.*?) \|$", table)
    return {key: meaning.replace("\\|", "|") for key, meaning in rows}


def write_tables(page: str) -> str:
    """The page with every table as the models have it; a section that it lacks comes at its end."""
    for heading, path, section in sections():
        if _found(page, heading) is None:
            page += f"\n## {heading}\n"
        found = _found(page, heading)
        assert found is not None
        begin, end = found.span("table")
        table = table_of(path, section, _meanings(found["table"]))
        page = page[:begin] + table + ("\n" if begin == end else "") + page[end:]
    return page


@pytest.mark.parametrize(("heading", "path", "section"), sections(), ids=lambda x: x if isinstance(x, str) else "")
def test_every_key_of_a_recipe_is_documented_as_the_models_have_it(heading, path, section):
    found = _found(RECIPE.read_text(), heading)
    there = found["table"] if found else ""
    wanted = table_of(path, section, _meanings(there))
    assert there == wanted, f"docs/recipe.md, under `## {heading}`, should have\n\n{wanted}"
    assert not [key for key, meaning in _meanings(there).items() if not meaning], "a key without a meaning"


def test_the_page_has_no_section_that_a_recipe_lacks():
    assert re.findall(r"(?m)^## (.+)$", RECIPE.read_text())[: len(list(sections()))] == [s[0] for s in sections()]


# Figures, names and links.


PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def test_every_kind_of_loss_is_in_the_table():
    from trainers.objectives.compose import LOSSES

    rows = re.findall(r"(?m)^\| `(\w+)` \|", (DOCS / "objectives.md").read_text())
    assert set(LOSSES) <= set(rows)


def test_the_example_in_engine_md_is_what_the_loss_gives():
    import torch

    from trainers.collectives import Group
    from trainers.objectives.contrastive import Contrastive
    from trainers.objectives.embedded import Embedded
    from trainers.objectives.keys import Keys
    from trainers.objectives.sections.contrastive import ContrastiveSection

    queries, documents = (torch.eye(2).requires_grad_() for _ in range(2))
    keys = Keys(torch.tensor([0, 1]), torch.tensor([2, 3]))
    embedded = Embedded(queries, documents, keys, keys, owners=torch.arange(2), global_queries=2)
    share = Contrastive(ContrastiveSection(temperature=1.0), Group())(embedded)
    share.loss.backward()
    page = (DOCS / "engine.md").read_text()
    assert f"{share.loss.item():.4f}" in page
    for gradient in (queries.grad, documents.grad):
        assert gradient is not None
        for row in gradient.tolist():
            assert f"({row[0]:+.4f}, {row[1]:+.4f})".replace("-", "−") in page


def test_every_metric_of_a_step_is_documented():
    documented = re.findall(r"(?m)^\| `(\w+)` \|", (DOCS / "training.md").read_text().partition("## The metrics")[2])
    assert set(documented) == set(_metrics_of_a_step())


def _metrics_of_a_step() -> dict[str, float]:
    """One step of the real loop, loss and queue over a table of vectors in the place of a model."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    from data_services.schema import Batch, Ragged
    from trainers import loop
    from trainers.collectives import Group
    from trainers.config import CheckpointConfig, FaultsConfig, QueueConfig
    from trainers.faults import Faults
    from trainers.negative_queue import Queues
    from trainers.objectives.compose import Sum
    from trainers.objectives.sections.contrastive import ContrastiveSection
    from trainers.objectives.sections.numbers import Schedule
    from trainers.step import ContrastiveStep, Memory

    group, ids = Group(), np.arange(2)
    engine: Any = SimpleNamespace(
        device=torch.device("cpu"),
        module=SimpleNamespace(
            tower=SimpleNamespace(
                gives_tokens=False, packed=False, of=lambda tower: SimpleNamespace(flops_per_token=lambda length: 1.0)
            ),
            learned_names=(),
            head=None,
        ),
        total_steps=1,
        compute_dtype=torch.float32,
        train=lambda: None,
        forward=lambda inputs: (torch.eye(8)[inputs.ids[:, 0]], torch.zeros(0), torch.zeros(0)),
        backward=lambda *_, **__: None,
        step=lambda: SimpleNamespace(grad_norm=1.0, lr=0.1, taken=True),
        replicas=dict,
        global_steps=1,
    )
    encoder: Any = SimpleNamespace(update=lambda: None, forward=engine.forward, replicas=list)
    memory = Memory(encoder, Queues(QueueConfig(rows=4), 8, group))
    objective = Sum([ContrastiveSection(temperature=Schedule(start=0.1, end=0.05))], group)
    step = ContrastiveStep(engine, objective, memory, cached=True, seed=0, group=group)
    batch = Batch(
        step=0,
        global_queries=2,
        queries=Ragged.of([[1], [2]]),
        documents=Ragged.of([[3], [4]]),
        query_ids=ids,
        document_ids=ids,
        owners=ids,
        relations=np.ones(2, np.int8),
        rows=ids,
        prompt_tokens=np.zeros(4, np.int64),
        chunks=(np.arange(4),),
    )
    seen: dict[str, float] = {}
    loop.run(
        loop.Job(
            step=step,
            batches=lambda start: iter([batch]),
            start=0,
            stop=1,
            save=lambda at: None,
            after_step=lambda at: None,
            checkpoint=CheckpointConfig(),
            group=group,
            sink=lambda at, metrics: seen.update(metrics),
            stop_requested=lambda: False,
            peak_flops=1.0,
            faults=Faults(FaultsConfig(), group),
        )
    )
    return seen


def test_every_file_of_a_run_is_documented():
    from cluster.paths import RunPaths

    run = RunPaths(Path("RUN"))
    page = (DOCS / "training.md").read_text()
    for name, value in vars(RunPaths).items():
        if isinstance(value, property) and isinstance(path := getattr(run, name), Path):
            assert re.search(rf"(?m)^{re.escape(path.name)}[/ ]", page), f"docs/training.md doesn't list {path.name}"


def test_links_lead_somewhere_and_the_index_has_every_page():
    for page in PAGES:
        prose = re.sub(r"(?ms)^```.*?^```", "", (DOCS / page).read_text())
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
            assert link.startswith("http") or (DOCS / link).exists(), f"docs/{page}: no {link}"
    linked = set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == set(PAGES) - {"README.md"}


if __name__ == "__main__":
    RECIPE.write_text(write_tables(RECIPE.read_text()))
