"""Every snippet of the documentation still works: what it imports is there, and the examples do what they say."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import DOCS, PAGES, TREE


def blocks(page: str, only_tested: bool = False) -> list[str]:
    """Python snippets of a page; those that the tests execute stand below a comment."""
    mark = "<!-- tested -->\n" if only_tested else ""
    return re.findall(rf"(?ms)^{mark}```python\n(.*?)^```", (DOCS / page).read_text())


def named_block(page: str, file: str) -> str:
    """The snippet whose first line is the comment `# file`."""
    (block,) = (b for b in blocks(page) if b.startswith(f"# {file}\n"))
    return block


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


def test_the_encoder_example_takes_the_arguments_it_is_called_with():
    tree = ast.parse(named_block("extending.md", "my_encoders.py"))
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef))
    assert [argument.arg for argument in function.args.args] == ["config", "folder"]
    assert isinstance(function.body[-1], ast.Return)
