"""Before training: sources as Parquet, the model folder, the plan, and what a resume must agree with."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from cluster.config import Recipe, differences
from cluster.models.folder import tokenizer_of
from cluster.paths import RunPaths
from data_services.items import TEXT, Kinds
from data_services.schema import Column, Tokenize, UsageError
from trainers.checkpoint import latest, write_json

if TYPE_CHECKING:
    import pyarrow as pa

    from data_services.faults import BadRows
    from data_services.order import Plan
    from data_services.sources import SourceConfig
    from data_services.store import Report, StoredSource
    from data_services.stream import Reader
    from data_services.teacher import Progress, Teacher
    from evaluation.retrieval import EvaluationConfig
    from trainers.config import ModelConfig

    MakeModel = Callable[[Recipe, Path, tuple[StoredSource, ...]], str]

TOKENIZER_RECORDS = 200_000  # more don't change a vocabulary of thousands
READ_RECORDS = 1024


@dataclass(frozen=True)
class Prepared:
    """A run made ready.

    root     home of all runs
    sources  in the recipe's order
    pools    what models are scored on, by split
    teacher  whose scores batches carry; None: those of the sources
    """

    recipe: Recipe
    root: Path
    run: RunPaths
    sources: tuple[StoredSource, ...]
    pools: dict[str, StoredSource]
    plan: Plan
    tokenize: Tokenize
    teacher: Teacher | None

    @property
    def reader(self) -> Reader:
        from data_services.refresh import RefreshedReader
        from data_services.stream import reader_of

        mine = self.recipe.mine
        reader = reader_of(self.recipe.data, self.plan, self.sources, self.tokenize, self.bad_rows, self.teacher)
        return reader if mine.every_steps is None else RefreshedReader(reader, mine, self.run.mined)

    @property
    def bad_rows(self) -> BadRows:
        """The rows that training had to do without."""
        from data_services.faults import BadRows

        return BadRows(self.run.quarantine)

    def lineage(self) -> dict[str, Any]:
        """What a checkpoint says of its origin; the tracker's run is in the run's folder."""
        return {
            "recipe": self.recipe.fingerprint(),
            "data": data_fingerprint(self.sources),
            "plan": self.plan.state(),
        }


def check_resumable(run: RunPaths, recipe: Recipe) -> None:
    """Raises UsageError with the list of what the run's folder lacks, or of what this recipe has otherwise."""
    missing = [str(p.relative_to(run.root)) for p in (run.data, run.model / "config.json") if not p.is_file()]
    if missing:
        raise UsageError(f"run {run.run_id} is incomplete, {', '.join(missing)} missing: it can't be resumed")
    try:
        saved = Recipe.model_validate_json(run.recipe.read_text())
    except ValidationError as error:
        raise UsageError(f"{run.recipe} is no recipe of this version: {error.errors()[0]['msg']}") from error
    changed = differences(saved, recipe)
    if changed:
        told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in sorted(changed.items()))
        raise UsageError(
            f"run {run.run_id} was made with another recipe: {told}. Resume with the recipe it was made with, or "
            "start a new run (model.init_from takes another model's weights)"
        )


def prepare(
    recipe: Recipe,
    root: Path,
    earlier: RunPaths | None,
    report: Report | None = None,
    on_progress: Progress = lambda what, done, of: None,
    *,
    new: RunPaths | None = None,
    make_model: MakeModel | None = None,
) -> Prepared:
    """Sources as Parquet, what a teacher says of them, the model folder, the plan. A new run's folder appears only once
    all of that is there.

    report      takes (finished parts, parts) of each source that is converted; on_progress what the teacher does
    new         where a new run lies; None: in a folder of the home, named by recipe and time
    make_model  makes the model folder, as `make_model_folder` does; None: that
    """
    from cluster.teaching import teacher_of

    sources, pools, plan = open_data(recipe, root, report)
    teacher = teacher_of(recipe, sources, root, on_progress)
    made_of = _made_of(recipe, sources, teacher)
    if earlier:
        check_data(earlier, made_of)
        check_plan(earlier, plan)
        return Prepared(recipe, root, earlier, sources, pools, plan, tokenizer_of(earlier.model), teacher)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run = new or RunPaths(root / f"{recipe.name}-{stamp}-{secrets.token_hex(2)}")
    building = RunPaths(run.root.with_name(f".{run.root.name}.new"))
    shutil.rmtree(building.root, ignore_errors=True)
    building.root.mkdir(parents=True)
    try:
        made = make_model(recipe, building.model, sources) if make_model else None
        building.parent.write_text(made or make_model_folder(recipe, building.model, sources, root))
        write_json(building.recipe, recipe.model_dump(mode="json"))
        write_json(building.data, made_of)
        building.root.rename(run.root)
    finally:
        shutil.rmtree(building.root, ignore_errors=True)
    return Prepared(recipe, root, run, sources, pools, plan, tokenizer_of(run.model), teacher)


class Opened(NamedTuple):
    """The data of a run; as `Prepared` has it."""

    sources: tuple[StoredSource, ...]
    pools: dict[str, StoredSource]
    plan: Plan


def open_data(recipe: Recipe, root: Path, report: Report | None = None) -> Opened:
    """Sources and pools as Parquet, and the plan. Raises UsageError where they, or the recipe, don't go together."""
    from data_services.sources import columns_available, open_source
    from data_services.stream import plan_of

    sources = tuple(open_source(source, root, report) for source in recipe.data.sources)
    # What the finished model is scored on, too, so that a fault in it is told before training.
    pools = {split: open_source(pool, root, report) for split, pool in pools_of(recipe).items()}
    check_kinds(recipe, (*sources, *pools.values()))
    check_scoring(recipe, pools)
    by_itself = {Column.MODALITY} if any(source.kinds != TEXT for source in sources) else set()
    if told := recipe.lacking(columns_available(source.columns for source in sources) | by_itself):
        raise UsageError(told)
    plan = plan_of(recipe.data, sources, recipe.seed)
    if recipe.optimizer.warmup_steps >= plan.steps:
        raise UsageError(
            f"optimizer.warmup_steps ({recipe.optimizer.warmup_steps}) leaves none of the plan's {plan.steps} steps: "
            "lower it"
        )
    if recipe.data.teacher is not None and by_itself:
        raise UsageError("data.teacher: it scores texts, and a source has images or sounds; leave it out")
    return Opened(sources, pools, plan)


def _made_of(recipe: Recipe, sources: tuple[StoredSource, ...], teacher: Teacher | None) -> dict[str, str]:
    """What batches are a function of beside the recipe, with its fingerprint."""
    from data_services.views.word_vectors import fingerprint

    files = [path for source in recipe.data.sources if source.views for path in source.views.files]
    named = {source.name: source.fingerprint for source in sources} | {path: fingerprint(path) for path in files}
    return named | ({"data.teacher": teacher.folder.name} if teacher else {})


def pools_of(recipe: Recipe) -> dict[str, SourceConfig]:
    """What the finished model is scored on, by split."""
    from data_services.sources import SourceConfig

    evaluation, first = recipe.evaluation, recipe.data.sources[0]
    splits, pool = [s for s in (evaluation.validation, evaluation.heldout) if s], evaluation.pool
    if pool is None or isinstance(pool, str):
        found = {split: first.texts_alone(pool or first.path, split) for split in splits}
    else:
        found = {split: SourceConfig(split=split, **pool.model_dump()) for split in splits}
    return {split: source.model_copy(update={"label": evaluation.classes}) for split, source in found.items()}


def check_sources(recipe: Recipe, root: Path) -> None:
    """Raises UsageError for a source or split that isn't there; before a cluster is started for it."""
    from data_services.origins import origin_of

    for source in (*recipe.data.sources, *pools_of(recipe).values()):
        origin_of(source, root)


def check_kinds(recipe: Recipe, sources: tuple[StoredSource, ...]) -> None:
    """Raises UsageError where a source holds what the model has no tower for, or a tower would be given nothing."""
    towers, found = recipe.model.kinds, set[str]()
    for source in sources:
        for side, form in zip(("queries", "documents"), source.kinds, strict=True):
            kinds = {form} if isinstance(form, str) else {"parts", *form.values()}
            found |= kinds
            if lacking := next((kind for kind in sorted(kinds) if kind not in towers), None):
                raise UsageError(
                    f"source {source.name}: its {side} are {lacking}, and the model reads {' and '.join(towers)} only; "
                    f"add model.{_KEY_OF.get(lacking, f'own.{lacking}')}"
                )
    needed = () if recipe.model.vision else towers[1:]
    if unread := next((kind for kind in needed if kind not in found), None):
        key = _KEY_OF.get(unread, f"own.{unread}")
        raise UsageError(f"model.{key}: no source has such items, so its tower would never be trained; remove it")


def check_scoring(recipe: Recipe, pools: Mapping[str, StoredSource]) -> None:
    """Raises UsageError where a table or a gate needs texts that a pool hasn't."""
    gate, judged = recipe.registry.gate, pools.get(recipe.evaluation.validation or "")
    if gate is not None and gate.over_bm25 is not None and judged is not None and judged.kinds != TEXT:
        told = f"{judged.name} isn't of texts alone, which BM25 reads; give a minimum"
        raise UsageError(f"registry.gate.over_bm25: {told}")
    nameless = next((pool for pool in pools.values() if pool.kinds.query != "text"), None)
    if recipe.evaluation.prompts and nameless:
        told = f"the queries of {nameless.name} are no texts to name classes by; leave it out"
        raise UsageError(f"evaluation.prompts: {told}")
    if recipe.model.pooling == "tokens" and (key := next(_of_vectors(recipe.evaluation), None)):
        raise UsageError(f"evaluation.{key}: an item has a vector for each token, and it takes one; leave it out")
    if recipe.evaluation.classes is not None:
        from data_services.sources import pool_classes
        from evaluation.probes import common_classes

        for pool in pools.values():
            common_classes(pool_classes(pool).numbers)


def _of_vectors(evaluation: EvaluationConfig) -> Iterator[str]:
    """Keys that ask for figures of single vectors."""
    yield from ("prompts",) if evaluation.prompts else ()
    yield from ("geometry",) if evaluation.geometry else ()
    yield from ("classes",) if evaluation.classes else ()


_KEY_OF = {"image": "image", "audio": "audio", "parts": "fields"}  # of a kind's tower in `model:`


def make_model_folder(recipe: Recipe, folder: Path, sources: tuple[StoredSource, ...], root: Path | None = None) -> str:
    """Config, tokenizer and, for a pretrained model, weights: one folder that every worker reads.

    Gives the name of the weights it begins from.
    """
    from data_services.tokenizer import train_bpe
    from trainers.encoders.model_folder import prepare_model_folder
    from trainers.encoders.towers import prepare_towers

    def train_tokenizer(vocabulary: int, target: Path) -> None:
        train_bpe(training_texts(sources), vocabulary, target)

    model, parent = on_this_machine(recipe.model, root)
    prepare_model_folder(model, folder, train_tokenizer)
    prepare_towers(model, folder)
    return parent


def on_this_machine(model: ModelConfig, root: Path | None) -> tuple[ModelConfig, str]:
    """The section with folders for the registered models that it names, and the name of the weights it begins from."""
    from cluster.models.reference import resolve

    named = {key: getattr(model, key) for key in ("path", "document_path", "init_from")}
    found = {key: resolve(uri, root) for key, uri in named.items() if uri and uri.startswith("models:")}
    names = named | {key: ref.name for key, ref in found.items()}
    folders = {key: str(ref.folder) for key, ref in found.items()}
    return model.model_copy(update=folders), names["init_from"] or names["path"] or "random weights"


def training_texts(sources: tuple[StoredSource, ...]) -> Iterator[str]:
    """Queries and documents of the sources, of at most TOKENIZER_RECORDS records each, spread over the source."""
    for source in sources:
        step = max(1, source.rows // TOKENIZER_RECORDS)
        for first in range(0, source.rows, READ_RECORDS * step):
            table = source.read(np.arange(first, min(first + READ_RECORDS * step, source.rows), step))
            yield from _texts_of(table, source.kinds)


def _texts_of(table: pa.Table, kinds: Kinds) -> Iterator[str]:
    """The texts of records, one after another, those among their parts too."""
    sides = {Column.QUERY: kinds.query, Column.POSITIVES: kinds.document, Column.NEGATIVES: kinds.document}
    read = [name for name, form in sides.items() if form == "text" or not isinstance(form, str)]
    for record in table.select(read).to_pylist():
        for name in read:
            for item in [record[name]] if name == Column.QUERY else record[name]:
                parts = [item] if isinstance(item, str) else item.values()
                yield from (part for part in parts if isinstance(part, str))


def check_data(run: RunPaths, now: Mapping[str, str]) -> None:
    """Raises UsageError where a source, or the teacher, isn't what it was when the run began. now: fingerprints."""
    saved = json.loads(run.data.read_text())
    changed = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
    if changed:
        raise UsageError(
            f"run {run.run_id} was made with other data: {', '.join(changed)} changed since. Bring the data back, or "
            "start a new run"
        )


def check_plan(run: RunPaths, plan: Plan) -> None:
    """Raises UsageError where the newest checkpoint's batches came in another order than the plan's."""
    from data_services.order import Plan

    newest = latest(run.checkpoints)
    changed = Plan.from_state(newest.state["lineage"]["plan"]).differences(plan) if newest else []
    if changed:
        raise UsageError(
            f"run {run.run_id} was made with another order of batches: {'; '.join(changed)}. Bring back what was, or "
            "start a new run"
        )


def data_fingerprint(sources: tuple[StoredSource, ...]) -> str:
    return "+".join(s.fingerprint for s in sources)
