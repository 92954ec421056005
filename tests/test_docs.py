"""The documentation says what the code does: every key, metric and file is named, every snippet still works.

`python -m tests.test_docs` writes the tables of docs/recipe.md anew; meanings that no model describes are kept.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from cluster.config import ANY_KEY, Recipe
from trainers.objectives.sections.numbers import Learned, Schedule

TREE = Path(__file__).parents[1]
DOCS = TREE / "docs"
RECIPE = DOCS / "recipe.md"
TOP = "The top level"
TABLE_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
# A table under its heading, with whatever text stands between them.
SECTION = r"(?m)^## {heading}\n(?P<text>(?:(?!## |\|).*\n)*)(?P<table>(?:\|.*\n)*)"
# Sections that stand in the place of a number, wherever one may.
NUMBERS: dict[type, str] = {Schedule: "A number that changes over the run", Learned: "A number that is learned"}
WORDS = {"schedule": Schedule, "learned": Learned}
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


# Snippets.


def blocks(page: str, only_tested: bool = False) -> list[str]:
    """Python snippets of a page; those that the tests execute stand below a comment."""
    mark = "<!-- tested -->\n" if only_tested else ""
    return re.findall(rf"(?ms)^{mark}```python\n(.*?)^```", (DOCS / page).read_text())


def named_block(page: str, file: str) -> str:
    """The snippet whose first line is the comment `# file`."""
    (block,) = (b for b in blocks(page) if b.startswith(f"# {file}\n"))
    return block


PAGES = sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_snippets_import_only_what_is_there(page):
    for block in blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                known = _names(node.module)
                assert known is None or {a.name for a in node.names} <= known, f"{page}: {ast.unparse(node)}"


def _names(module: str) -> set[str] | None:
    """Names that a module of this tree defines, without importing it; None for other packages that are there."""
    place = TREE / module.replace(".", "/")
    if not (TREE / module.partition(".")[0]).is_dir():
        assert importlib.util.find_spec(module.partition(".")[0]), f"no package {module}"
        return None
    inside = {path.stem for path in place.glob("*.py")}
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inside.add(node.name)
        elif isinstance(node, ast.Assign):
            inside |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            inside |= {alias.name for alias in node.names}
    return inside


def test_notebook_calls_fit_the_functions_signatures():
    checked = 0
    for block in blocks("notebook.md"):
        tree, names = ast.parse(block), dict[str, Any]()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module and _names(node.module) is not None:
                exec(ast.unparse(node), names)
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            function = _resolved(call.func, names)
            if function is not None:
                keywords = {k.arg: None for k in call.keywords if k.arg}
                inspect.signature(function).bind(*call.args, **keywords)
                checked += 1
    assert checked >= 10


def _resolved(node: ast.expr, names: dict[str, Any]) -> Any:
    """The imported function that an expression like `models.query` means, None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolved(node.value, names)
        return None if owner is None else getattr(owner, node.attr)
    return None


def test_notebook_snippets_that_cost_nothing_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(TREE)
    monkeypatch.setenv("GYRE_HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for block in blocks("notebook.md", only_tested=True):
        exec(block, {})
    assert "did you mean objective.temperature?" in capsys.readouterr().out


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Writes a snippet of a page as a module into the working directory; gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(file: str, page: str = "extending.md") -> str:
        (tmp_path / file).write_text(named_block(page, file))
        made.append(Path(file).stem)
        return made[-1]

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_the_source_example_gives_pairs_by_split(example, tmp_path):
    from data_services.sources import SourceConfig, open_source

    lines = [f"how do I do {i}?,like this: {i},\n" for i in range(200)]
    (tmp_path / "faq.csv").write_text("question,answer,wrong\n" + "".join(lines) + "and now?,so,not so\n")
    path = f"{example('my_sources.py')}:faq"
    config = SourceConfig(path=path, negatives="negatives")
    splits = {
        split: open_source(config.model_copy(update={"split": split}), tmp_path / "home").table().to_pylist()
        for split in ("train", "validation", "heldout")
    }
    assert sum(len(rows) for rows in splits.values()) == 201
    assert len(splits["train"]) > 120
    assert min(len(splits["validation"]), len(splits["heldout"])) > 5
    everything = [row for rows in splits.values() for row in rows]
    assert len({row["query"] for row in everything}) == 201
    assert {row["query"]: row["negatives"] for row in everything}["and now?"] == ["not so"]


def test_the_objective_example_is_its_loss_and_gradient(example):
    from dataclasses import replace

    import torch

    from data_services.imports import import_object
    from tests.twins import random_shares
    from trainers.collectives import Group
    from trainers.objectives.config import CustomSection
    from trainers.objectives.contrastive import Contrastive
    from trainers.objectives.embedded import LossShare
    from trainers.objectives.sections.contrastive import ContrastiveSection

    path = f"{example('my_objectives.py')}:Aligned"
    group, share = Group(), random_shares(0, [(6, 8)], 8)[0]
    losses, gradients = [], []
    for objective in (
        import_object(path, "objective.path")(CustomSection(path=path), group),
        Contrastive(ContrastiveSection(), group),
    ):
        queries, documents = (x.clone().requires_grad_() for x in (share.queries, share.documents))
        found = objective(replace(share, queries=queries, documents=documents))
        assert isinstance(found, LossShare)
        assert all(isinstance(value, float) for value in found.metrics.values())
        found.loss.backward()
        assert found.loss.item() == pytest.approx(found.metrics["loss"], rel=1e-5)
        assert queries.grad is not None
        losses.append(found.loss.item())
        gradients.append(queries.grad)
    apart = share.queries - share.positives
    assert losses[0] - losses[1] == pytest.approx(0.1 * apart.square().sum(1).mean().item(), rel=1e-4)
    torch.testing.assert_close(gradients[0] - gradients[1], 0.2 * apart / 6, rtol=1e-4, atol=1e-6)


def test_the_example_of_a_new_loss_passes_its_own_test(example, gloo, tmp_path):
    example("my_losses.py", "objectives.md")
    its_test = importlib.import_module(example("test_my_losses.py", "objectives.md"))
    gloo(3, _import_from, str(tmp_path))
    passes = its_test.test_loss_and_gradients_are_those_of_the_definition
    (splits,) = (mark.args[1] for mark in passes.pytestmark)
    assert sorted(map(len, splits)) == [1, 3]
    for split in splits:
        passes(gloo, split)


def _import_from(folder: str) -> None:
    sys.path.append(folder)


def test_every_kind_of_loss_is_in_the_table():
    from trainers.objectives.compose import LOSSES

    rows = re.findall(r"(?m)^\| `(\w+)` \|", (DOCS / "objectives.md").read_text())
    assert set(LOSSES) <= set(rows)


def test_the_encoder_example_takes_the_arguments_it_is_called_with():
    tree = ast.parse(named_block("extending.md", "my_encoders.py"))
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef))
    assert [argument.arg for argument in function.args.args] == ["config", "folder"]
    assert isinstance(function.body[-1], ast.Return)


# Figures, names and links.


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
    from trainers.config import CheckpointConfig, QueueConfig
    from trainers.negative_queue import Queues
    from trainers.objectives.compose import Sum
    from trainers.objectives.sections.contrastive import ContrastiveSection
    from trainers.objectives.sections.numbers import Schedule
    from trainers.step import ContrastiveStep, Memory

    group, ids = Group(), np.arange(2)
    engine: Any = SimpleNamespace(
        device=torch.device("cpu"),
        module=SimpleNamespace(tower=SimpleNamespace(gives_tokens=False, packed=False), learned_names=(), head=None),
        total_steps=1,
        train=lambda: None,
        forward=lambda input_ids, **_: (torch.eye(8)[input_ids[:, 0]], torch.zeros(0), torch.zeros(0)),
        backward=lambda *_, **__: None,
        step=lambda: SimpleNamespace(grad_norm=1.0, lr=0.1),
    )
    encoder: Any = SimpleNamespace(update=lambda: None, forward=engine.forward)
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
            flops_per_token=lambda length: 1.0,
            peak_flops=1.0,
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
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (DOCS / page).read_text()):
            assert link.startswith("http") or (DOCS / link).exists(), f"docs/{page}: no {link}"
    linked = set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "README.md").read_text()))
    assert linked == set(PAGES) - {"README.md"}


if __name__ == "__main__":
    RECIPE.write_text(write_tables(RECIPE.read_text()))
