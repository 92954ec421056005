"""The model card: README.md of an export, with the metadata that the Hugging Face hub reads.

The trainer writes how the folder is loaded; here comes what only the whole run knows: licence, data, scores, lineage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_services.schema import UsageError
from evaluation.retrieval import PoolConfig

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

    from cluster.config import Recipe

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CardFacts:
    """What a card says of its run. scores: {split: {model: {metric: value}}}; lineage: as a registered version's."""

    recipe: Recipe
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    lineage: Mapping[str, str] = field(default_factory=dict)


def write_card(export: Path, facts: CardFacts) -> None:
    """Completes the card of an export; written again, it is the same."""
    from huggingface_hub import ModelCard, ModelCardData

    recipe, about = facts.recipe, facts.recipe.registry.card
    trained = {split: rows["trained"] for split, rows in facts.scores.items() if "trained" in rows}
    data = ModelCardData(
        model_name=recipe.registered_name,
        license=about.licence,
        language=about.languages or None,
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction" if recipe.model.pooling == "tokens" else "sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "gyre"],
        datasets=about.datasets or _hub_datasets(recipe) or None,
        base_model=_base_model(recipe),
        metrics=sorted({name.partition("@")[0] for row in trained.values() for name in row}) or None,
        eval_results=[r for split, row in trained.items() for r in _results(recipe, split, row)] or None,
    )
    body = "\n".join([_loading(export, recipe.registered_name), *_sections(facts)])
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    making = export / f".{CARD}.making"
    making.write_text(str(card))
    making.replace(export / CARD)


def licence_of(folder: Path) -> str:
    """The licence that a folder's card names, "" without a card or licence."""
    card = _card(folder)
    return str(card.data.get("license") or "") if card else ""


def _card(folder: Path) -> ModelCard | None:
    import yaml
    from huggingface_hub import ModelCard

    if not (folder / CARD).is_file():
        return None
    text = (folder / CARD).read_text()
    text = text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}"  # else the hub's library warns
    try:
        return ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{folder / CARD} has metadata that isn't YAML: {str(error).splitlines()[0]}") from error


def _loading(export: Path, name: str) -> str:
    """The card's first part as the trainer wrote it, or as an earlier call left it."""
    card = _card(export)
    text = card.text.lstrip() if card else ""
    text = re.split(r"(?m)^## (?:About|Scores|Training)$", text)[0].rstrip()
    return re.sub(r"^# .*", f"# {name}", text or f"# {name}", count=1) + "\n"


def _sections(facts: CardFacts) -> Iterator[str]:
    if about := facts.recipe.registry.card.description:
        yield f"## About\n\n{about.strip()}\n"
    if any(facts.scores.values()):
        yield "## Scores\n"
        yield from (_table(split, rows) for split, rows in facts.scores.items() if rows)
    yield "## Training\n"
    yield "\n".join(_training(facts)) + "\n"


def _table(split: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    metrics = list(next(iter(rows.values())))
    lines = [f"| {split} | {' | '.join(metrics)} |", f"|---|{'---|' * len(metrics)}"]
    lines += [f"| {model} | {' | '.join(f'{row[m]:.4f}' for m in metrics)} |" for model, row in rows.items()]
    return "\n".join(lines) + "\n"


def _training(facts: CardFacts) -> Iterator[str]:
    recipe = facts.recipe
    sources = ", ".join(f"`{source.path}`" for source in recipe.data.sources)
    yield f"- data: {sources}"
    yield f"- objective: {recipe.objective.kind}" + "".join(f", {term.kind}" for term in recipe.terms)
    yield f"- batch of {recipe.data.batch} queries, seed {recipe.seed}"
    yield from (f"- {part}: `{value}`" for part, value in facts.lineage.items())


def _results(recipe: Recipe, split: str, row: Mapping[str, float]) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    pool = recipe.evaluation.pool or recipe.data.sources[0].path
    dataset = pool.path if isinstance(pool, PoolConfig) else str(pool)
    for metric, value in row.items():
        yield EvalResult(
            task_type="text-retrieval",
            dataset_type=dataset.removeprefix("hf:"),
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric.replace("@", "_at_"),
            metric_name=metric,
            metric_value=round(value, 6),
        )


def _hub_datasets(recipe: Recipe) -> list[str]:
    paths = [path for s in recipe.data.sources for path in ([s.path] if isinstance(s.path, str) else s.path)]
    return [path.removeprefix("hf:") for path in paths if path.startswith("hf:")]


def _base_model(recipe: Recipe) -> str | None:
    path = recipe.model.path
    return path if path and _HUB_ID.fullmatch(path) and not Path(path).exists() else None
