"""The recipe: every room's section put together, read from YAML, checked before anything heavy is imported."""

from __future__ import annotations

import difflib
import hashlib
import json
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from cluster.recipe_file import apply_overrides, read_yaml
from cluster.search.config import SearchConfig
from data_services.refresh import RefreshConfig
from data_services.schema import Section, UsageError
from data_services.sources import columns_available
from data_services.stream import DataConfig
from evaluation.gates import GateConfig
from evaluation.metrics import metric_names
from evaluation.retrieval import EvaluationConfig
from trainers.config import (
    CheckpointConfig,
    EngineConfig,
    FaultsConfig,
    ModelConfig,
    MomentumConfig,
    OptimizerConfig,
    QueueConfig,
)
from trainers.objectives.config import AnyTerm, CustomSection, MainTerm
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.objectives.sections.distill import EmbeddingDistillSection
from trainers.objectives.sections.numbers import Term
from trainers.objectives.sections.wrappers import GradedWeights, Layers, MaskedLM, Matryoshka

# The column of a source for what a loss needs of each pair.
COLUMN_OF = {
    "labels": "label",
    "tasks": "task",
    "languages": "language",
    "modalities": "modality",
    "frequencies": "frequency",
}
ANY_KEY = "KEY"  # an element of a mapping, where the keys of a section are listed
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"


class CardConfig(Section):
    """`registry.card:` what the model card says that nobody can measure."""

    licence: str | None = Field(None, description="of the model, as the hub writes it: apache-2.0, mit, cc-by-4.0, …")
    languages: list[str] = Field([], description="ISO codes: en, de, code, …")
    datasets: list[str] = Field([], description="hub ids of the training data; []: those of data.sources")
    description: str | None = Field(None, description="what the model is for, and what it isn't for (Markdown)")


class RegistryConfig(Section):
    """`registry:` where the trained model is registered, and what it must reach to become champion."""

    name: str | None = Field(None, pattern=NAME, description="registered model; None: the recipe's name")
    gate: GateConfig | None = Field(None, description="None: every version may become champion")
    card: CardConfig = Field(CardConfig(), description="what the model card says that nobody can measure")


class ClusterConfig(Section):
    """`cluster:` where the run is placed. RAY_ADDRESS goes before `address`; with neither, Ray runs here."""

    address: str | None = Field(None, description="host:port of a running cluster's head")
    workers: int = Field(1, gt=0, description="W, processes that train")
    cpus_per_worker: int = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    cpus_for_data: int = Field(1, gt=0, description="CPUs that read and tokenise, beside the workers'")
    threads_per_worker: int | None = Field(None, gt=0, description="None: cpus_per_worker")
    storage: str | None = Field(None, description="folder all nodes share, for runs; None: GYRE_HOME")
    max_failures: int = Field(3, ge=0, description="deaths of workers healed before the run gives up")

    @property
    def threads(self) -> int:
        """OMP_NUM_THREADS of a worker."""
        return self.threads_per_worker or self.cpus_per_worker


class Recipe(Section):
    """One run, completely described."""

    name: str = Field(pattern=NAME, description="names the experiment, and the registered model by default")
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataConfig
    model: ModelConfig
    objective: MainTerm = ContrastiveSection()
    terms: list[AnyTerm] = Field([], description="further losses, added to the objective with their weights")
    matryoshka: Matryoshka | None = Field(None, description="the losses also on prefixes of the vectors")
    layers: Layers | None = Field(None, description="the losses on the vectors of several layers")
    graded_weights: GradedWeights | None = Field(None, description="weights pairs by the grades of their positives")
    masked_lm: MaskedLM | None = Field(None, description="an auxiliary loss on token states")
    mine: RefreshConfig = RefreshConfig()
    queue: QueueConfig = QueueConfig()
    momentum: MomentumConfig = MomentumConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()
    cluster: ClusterConfig = ClusterConfig()
    search: SearchConfig | None = Field(None, description="what `gyre search` varies; `gyre train` leaves it aside")

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.data.batch < self.cluster.workers:
            raise ValueError(
                f"data.batch ({self.data.batch}) is smaller than cluster.workers ({self.cluster.workers}): "
                "every worker needs at least one query; raise the one or lower the other"
            )
        if self.data.steps is not None and self.optimizer.warmup_steps >= self.data.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) leaves nothing of data.steps "
                f"({self.data.steps}); lower it"
            )
        self._check_losses()
        self._check_teacher()
        self._check_mining()
        self._check_kept()
        if self.evaluation.prompts and self.model.pooling == "tokens":
            raise ValueError("evaluation.prompts needs one vector an item: leave it out with model.pooling: tokens")
        gate, evaluation, first = self.registry.gate, self.evaluation, self.data.sources[0]
        if first.one_text and not evaluation.pool and (evaluation.validation or evaluation.heldout):
            raise ValueError(
                "data.sources.0 has texts without queries, which can't be scored by retrieval: name a source with "
                "fields `query` and `positive` in evaluation.pool, or set evaluation.validation and "
                "evaluation.heldout to null"
            )
        if gate is not None and (gate.over_bm25 is not None or gate.minimum is not None):
            measured = metric_names(evaluation.k)
            if not evaluation.validation:
                raise ValueError("registry.gate needs evaluation.validation, which is empty; name a split")
            if gate.metric not in measured:
                raise ValueError(
                    f"registry.gate.metric is {gate.metric!r}, which evaluation.k = {evaluation.k} doesn't measure: "
                    f"choose one of {', '.join(measured)}, or change evaluation.k"
                )
        return self

    def _check_mining(self) -> None:
        """What is mined while training is read, by one vector a text."""
        if self.mine.every_steps is None:
            return
        if not self.data.negatives:
            raise ValueError("mine.every_steps needs data.negatives above 0: no batch would show what was mined")
        if self.model.kinds != ("text",):
            raise ValueError("mine.every_steps mines among texts, and the model has towers for more; leave it out")
        if self.model.pooling == "tokens":
            raise ValueError("mine.every_steps needs one vector a text: choose another model.pooling than tokens")
        if self.data.teacher and not self.data.teacher.gives_vectors:
            raise ValueError(
                "mine.every_steps finds pairs that data.teacher hasn't scored before training: take a teacher with "
                "vectors (model or embeddings)"
            )

    def _check_kept(self) -> None:
        """The best checkpoints are among those of steps that are scored."""
        every, keep_best = self.evaluation.every_steps, self.checkpoint.keep_best
        if keep_best and self.evaluation.best_by is None:
            raise ValueError("checkpoint.keep_best chooses by scores beside training: name evaluation.best_by")
        if keep_best and every is not None and every % self.checkpoint.every_steps:
            raise ValueError(
                f"evaluation.every_steps ({every}) is no multiple of checkpoint.every_steps "
                f"({self.checkpoint.every_steps}): checkpoint.keep_best couldn't keep the steps that are scored"
            )

    def _check_teacher(self) -> None:
        """What a teacher gives is compared, whole."""
        needed = frozenset[str]().union(*(term.needs for term in self.losses))
        customs = any(isinstance(term, CustomSection) for term in self.losses)
        if self.data.teacher and not (needed & {"scores", "teacher_vectors"} or self.graded_weights or customs):
            raise ValueError("data.teacher is read by no loss: add one that distils (margin_mse, kl_distill, …)")
        of_teacher = [t for t in self.losses if isinstance(t, EmbeddingDistillSection) and t.teacher == "data"]
        if self.matryoshka and of_teacher:
            raise ValueError(
                "matryoshka compares prefixes, and embedding_distill a teacher's whole vectors: take "
                "similarity_distill, or leave out matryoshka"
            )

    def _check_losses(self) -> None:
        """Losses get what they need of the data and the model."""
        possible = columns_available(source.possible_columns for source in self.data.sources)
        possible |= {"modality"} if self.model.kinds != ("text",) else set()  # what a record's sides are
        if told := self.lacking(possible):
            raise ValueError(told)
        if self.masked_lm and (self.model.bidirectional is False or self.model.towers == "separate"):
            raise ValueError("masked_lm needs one tower whose attention sees both sides: set model.bidirectional: true")
        if self.masked_lm and self.model.kinds != ("text",):
            raise ValueError("masked_lm is for a text tower alone: leave it out beside towers for other kinds")
        if (self.layers is None) != (not self.model.layers):
            raise ValueError("layers and model.layers go together: name the layers there, and weigh their losses here")
        for i, term in enumerate(self.losses):
            where = f"terms.{i - 1}" if i else "objective"
            by_token = getattr(term, "similarity", None) == "max_sim"
            if by_token != (self.model.pooling == "tokens") and (by_token or i == 0):
                raise ValueError(
                    f"{where}.similarity: max_sim and model.pooling: tokens go together; set both or neither"
                )

    def lacking(self, there: Collection[str]) -> str | None:
        """A sentence about what the losses need and batches won't have; None where they have all of it.

        there  the `Column.OPTIONAL` that every source has, or may turn out to have
        """
        teacher, scores = self.data.teacher, ["positive_scores"] + ["negative_scores"] * (self.data.most_negatives > 0)
        for i, term in enumerate(self.losses):
            where = f"terms.{i - 1}" if i else "objective"
            if "teacher_vectors" in term.needs and not (teacher and teacher.gives_vectors):
                return f"{where} needs a teacher's vectors: name its model, or embeddings, in data.teacher"
            columns = [COLUMN_OF[need] for need in sorted(term.needs & COLUMN_OF.keys())]
            if "scores" in term.needs and teacher is None:
                columns += scores
            for column in columns:
                if column not in there:
                    more = ", or a data.teacher" if column in scores else ""
                    return (
                        f"{where} needs {column} of every pair: name its field in every one of data.sources, as "
                        f"{column}{more}"
                    )
        return None

    @property
    def losses(self) -> tuple[Term, ...]:
        return (self.objective, *self.terms)

    @property
    def registered_name(self) -> str:
        return self.registry.name or self.name

    def canonical(self) -> str:
        """The recipe as JSON with sorted keys: equal recipes, however they were written, give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


# Keys that may change between the parts of one run: none of them enters a batch, a loss or a weight.
FREE_ON_RESUME = ("cluster.", "checkpoint.", "faults.", "registry.", "evaluation.", "search")


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists as (dotted key, value), in order: `data.sources.0.path`."""
    items: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping) and value:
        items = iter(value.items())
    elif isinstance(value, list | tuple) and value:
        items = iter(enumerate(value))
    else:
        yield path, value
        return
    for key, inner in items:
        yield from flatten(inner, f"{path}.{key}" if path else str(key))


def differences(saved: Recipe, given: Recipe, free: Sequence[str] = FREE_ON_RESUME) -> dict[str, tuple[Any, Any]]:
    """Dotted keys that differ, with (saved, given), but for those that begin with one of `free`. None: absent."""
    old, new = (dict(flatten(r.model_dump(mode="json"))) for r in (saved, given))
    keys = [k for k in [*old, *(k for k in new if k not in old)] if not k.startswith(tuple(free))]
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key.path=value` overrides, whose values are YAML.

    Raises UsageError, one sentence with the file, the full path of the key and what was expected.
    """
    raw = read_yaml(Path(path))
    given = apply_overrides(raw, overrides)
    return parse_recipe(raw, str(path), given)


def parse_recipe(raw: Mapping[str, Any], where: str, overridden: Sequence[str] = ()) -> Recipe:
    """`raw` as a Recipe; errors name `where` it is from, or the command line for the keys `overridden` there."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    first = min(problems, key=lambda p: p["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    key, generic = _key(first["loc"], misspelt=first["type"] == "extra_forbidden")
    if any(key == k or key.startswith(k + ".") or k.startswith(key + ".") for k in overridden if key):
        where = "command line"
    more = f" ({len(problems) - 1} more to mend)" if len(problems) > 1 else ""
    raise UsageError(f"{where}: {_sentence(key, generic, first)}{more}")


def _key(loc: Sequence[str | int], misspelt: bool) -> tuple[str, str]:
    """The dotted key of an error's place, as it stands there and as `known_keys` has it.

    pydantic also names the alternative of a type that it tried.
    """
    path: list[str] = []
    generic: list[str] = []
    known = [k.split(".") for k, _ in known_keys(Recipe)]
    for part in loc:
        for name in ("0",) if isinstance(part, int) else (str(part), ANY_KEY):
            there = any(k[: len(generic) + 1] == [*generic, name] for k in known)
            if there or isinstance(part, int) or (misspelt and part is loc[-1]):
                path.append(str(part))
                generic.append(name)
                break
    return ".".join(path), ".".join(generic)


def _sentence(key: str, generic: str, problem: Any) -> str:
    kind, message, value = problem["type"], problem["msg"], problem["input"]
    if kind == "extra_forbidden":
        if generic in dict(known_keys(Recipe)):
            return f"{key} isn't a key of this kind; remove it, or choose the kind that has it"
        return f"unknown key {key}{_nearest(key, generic)}"
    if kind == "union_tag_invalid":
        expected = problem["ctx"]["expected_tags"].replace("'", "")
        return f"{key}.kind is {problem['ctx']['tag']!r}: it should be one of {expected}"
    if kind == "union_tag_not_found":
        return f"{key}.kind is missing{_described(generic)}"
    if kind == "missing":
        return f"{key} is missing{_described(generic)}"
    if kind == "value_error":
        told = str(problem["ctx"]["error"])
        return f"{key}: {told}" if key else told
    if kind in ("model_type", "model_attributes_type"):
        message = "Input should be a section with keys of its own"
    if key and kind.endswith("_type") and value is None:
        return f"{key} is empty: {message.replace('Input', 'it')}{_described(generic)}"
    return f"{key or 'the recipe'} is {_shown(value)}: {message.replace('Input', 'it', 1)}{_described(generic)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(key: str, generic: str) -> str:
    """The known key that was probably meant: first among its neighbours, then by its last name anywhere."""
    parent, _, leaf = key.rpartition(".")
    known = dict(known_keys(Recipe))
    beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == generic.rpartition(".")[0]]
    if close := difflib.get_close_matches(leaf, beside, 1, 0.6):
        return f"; did you mean {parent + '.' if parent else ''}{close[0]}?"
    elsewhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    if close := difflib.get_close_matches(leaf, list(elsewhere), 1, 0.8):
        return f"; did you mean {elsewhere[close[0]]}?"
    return f"; known there: {', '.join(beside)}" if beside else ""


def _described(generic: str) -> str:
    text = dict(known_keys(Recipe)).get(generic)
    return f" ({text})" if text else ""


def known_keys(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, str | None]]:
    """Every dotted key of a section with its description; an element of a list is `0`, of a mapping `KEY`."""
    for name, field in section.model_fields.items():
        key = f"{path}{name}"
        yield key, field.description
        for inner, suffix in _sections_of(field.annotation):
            yield from known_keys(inner, f"{key}.{suffix}")


def _sections_of(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix
    elif (origin := get_origin(annotation)) in (Union, types.UnionType, Annotated):
        for inner in get_args(annotation):
            yield from _sections_of(inner, suffix)
    elif origin in (list, tuple):
        for inner in get_args(annotation):
            yield from _sections_of(inner, f"{suffix}0.")
    elif origin is dict:
        yield from _sections_of(get_args(annotation)[1], f"{suffix}{ANY_KEY}.")
