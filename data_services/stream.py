"""Which pairs, in which order, and how a global batch is read; `ray_feed` does it on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from data_services.assemble import GlobalBatch, tokenise
from data_services.collate import share_batch
from data_services.faults import BadRow, BadRows, patiently
from data_services.items import TEXT, Kinds
from data_services.order import Plan, RowGroups, SourceShape, Stage
from data_services.schema import SOURCE_SHIFT, Batch, Column, RunError, Section, Tokenize, Undecodable, text_id
from data_services.sources import SourceConfig
from data_services.store import StoredSource
from data_services.teacher import Teacher, TeacherConfig
from data_services.views.config import Views

if TYPE_CHECKING:
    import pyarrow as pa


class StageConfig(Section):
    """What changes from a step on, until the next stage."""

    from_step: int = Field(0, ge=0, description="first step of the stage; 0 for the first one")
    weights: list[float] | None = Field(
        None,
        min_length=1,
        description="shares of the mixture, one for each of `data.sources`, 0 leaves one out; none: their own",
    )
    homogeneous: bool | None = Field(None, description="None: as `data.homogeneous`")
    negatives: int | None = Field(None, ge=0, description="None: as `data.negatives`")


class DataConfig(Section):
    """`data:` which pairs, in which order."""

    sources: list[SourceConfig] = Field(min_length=1)
    batch: int = Field(256, gt=0, description="B, queries of a global batch over all workers")
    epochs: float | None = Field(None, gt=0, description="passes over all sources together; or give `steps`")
    steps: int | None = Field(None, gt=0, description="global batches of the run; or give `epochs`")
    mixing_temperature: float = Field(
        1.0, gt=0, description="sources without weights are drawn by rows**(1/temperature)"
    )
    homogeneous: bool = Field(True, description="each global batch from one source, else mixed")
    stages: list[StageConfig] = Field([], description="a curriculum: what changes at which step")
    duplicates: Literal["avoid", "allow"] = Field(
        "avoid",
        description="rows with the same query or a positive in common: kept out of each other's global batch where "
        "their shuffling window can do it, or left to the loss's mask",
    )
    neighbours: bool = Field(
        False,
        description="fill a global batch with rows of one cluster, or of clusters with neighbouring numbers: each "
        "source names its `cluster`",
    )
    window_groups: int = Field(64, gt=0, description="row groups that are shuffled together")
    positives: int = Field(
        1, ge=1, description="positives of a record in one batch, at most; where it has more, a hash chooses"
    )
    negatives: int = Field(0, ge=0, description="hard negatives taken of each record, the first ones")
    teacher: TeacherConfig | None = Field(
        None, description="scores every query's documents, for losses that distil; none: the sources' own scores"
    )
    read_ahead_mib: int = Field(256, gt=0, description="object store memory for batches ahead of training")

    @model_validator(mode="after")
    def _one_length(self) -> DataConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of `epochs` and `steps`")
        return self

    @model_validator(mode="after")
    def _stages_ascend(self) -> DataConfig:
        starts = [stage.from_step for stage in self.stages]
        if starts and (starts[0] != 0 or any(b <= a for a, b in pairwise(starts))):
            raise ValueError(f"stages begin at steps {starts}: the first begins at 0, each later one after the last")
        return self

    @model_validator(mode="after")
    def _clusters_agree(self) -> DataConfig:
        for i, source in enumerate(self.sources):
            if self.neighbours and source.cluster is None:
                raise ValueError(
                    f"neighbours needs the cluster of every row: name its field as data.sources.{i}.cluster; "
                    "`gyre data cluster` makes one"
                )
            if source.cluster is not None and not self.neighbours:
                raise ValueError(f"sources.{i}.cluster is only read with data.neighbours: true; set that, or drop this")
        if self.neighbours and self.duplicates == "allow":
            raise ValueError("neighbours brings duplicates together: leave data.duplicates at avoid")
        return self

    @model_validator(mode="after")
    def _one_scores(self) -> DataConfig:
        for i, source in enumerate(self.sources):
            if self.teacher is not None and (source.positive_scores or source.negative_scores):
                raise ValueError(
                    f"teacher scores every pair, and sources.{i} names fields of scores: choose one of them"
                )
        return self

    @property
    def most_negatives(self) -> int:
        """Hard negatives of a record at any step, at most."""
        told = [stage.negatives for stage in self.stages] or [None]
        return max(self.negatives if negatives is None else negatives for negatives in told)


class Rows(Protocol):
    """A stored source: the records (`schema.Column`) of rows [m], in that order."""

    @property
    def columns(self) -> frozenset[str]:
        """Which of `Column.OPTIONAL` it has."""
        ...

    @property
    def kinds(self) -> Kinds: ...

    def read(self, rows: np.ndarray) -> pa.Table: ...


@dataclass(frozen=True)
class BatchReader:
    """Global batch t, tokenised: a pure function of t. `sources` are in the order of `plan.sources`.

    negatives, positives  of a record, at most, where a stage of the plan doesn't say; see `assemble.tokenise`
    bad_rows              takes the rows that can't be decoded. They shorten their batch; no other takes their place
    views                 of the sources, in their order; none: every text as it is
    teacher               whose scores, or vectors, every batch carries; none: the sources' own scores

    Reading that fails is tried again (`faults.patiently`), then RunError; RunError also where no row is left.
    """

    plan: Plan
    sources: Sequence[Rows]
    tokenize: Tokenize
    negatives: int = 0
    positives: int = 1
    bad_rows: BadRows = field(default_factory=BadRows)
    views: Sequence[Views | None] = ()
    teacher: Teacher | None = None

    def __call__(self, t: int) -> GlobalBatch:
        batch = self._decoded(t, *self.records(t))
        return batch if self.teacher is None else patiently(partial(self.teacher.taught, batch), "the teacher's part")

    def records(self, t: int) -> tuple[pa.Table, np.ndarray]:
        """(the records of global batch t, their row keys [B]), in the plan's order."""
        import pyarrow as pa

        planned = patiently(partial(self.plan.rows, t), f"the ids of step {t}")
        parts, places = [], []
        for source in np.unique(planned[:, 0]):
            where = np.flatnonzero(planned[:, 0] == source)
            rows, name = planned[where, 1], self.plan.sources[source].name
            parts.append(patiently(partial(self._read, source, rows), f"source {name}"))
            places.append(where)
        mixed = any(source.kinds != self.sources[0].kinds for source in self.sources)  # texts beside bytes
        together = pa.concat_tables(parts, promote_options="permissive" if mixed else "none")
        table = together.take(np.argsort(np.concatenate(places)))
        return table, planned[:, 0] << SOURCE_SHIFT | planned[:, 1]

    @property
    def columns(self) -> list[str]:
        """What every batch is made from: the optional columns that any source has, null where another hasn't."""
        known = {Column.TASK}.union(*(source.columns for source in self.sources))
        known |= {Column.MODALITY} if self._has_media else set()
        return [Column.ID, *Column.NEEDED, *(name for name in Column.OPTIONAL if name in known)]

    @property
    def _has_media(self) -> bool:
        return any(source.kinds != TEXT for source in self.sources)

    def _decoded(self, t: int, table: pa.Table, keys: np.ndarray) -> GlobalBatch:
        """The batch of these records, less those that can't be tokenised."""
        try:
            return self._tokenise(t, table, keys)
        except Undecodable:
            good = [i for i in range(len(keys)) if self._decodable(t, table.slice(i, 1), keys[i : i + 1])]
        if not good:
            where = f"; see {self.bad_rows.folder}" if self.bad_rows.folder else ""
            raise RunError(f"none of the {len(keys)} rows of step {t} can be decoded{where}")
        return self._tokenise(t, table.take(good), keys[good])

    def _tokenise(self, t: int, table: pa.Table, keys: np.ndarray) -> GlobalBatch:
        negatives = self.plan.negatives(t, self.negatives)
        kinds = [source.kinds for source in self.sources]
        return tokenise(table, keys, self.tokenize, t, self.plan.seed, negatives, self.positives, self.views, kinds)

    def _decodable(self, t: int, record: pa.Table, key: np.ndarray) -> bool:
        """Whether the record can be tokenised; one that can't is put aside."""
        try:
            self._tokenise(t, record, key)
        except Undecodable as error:
            name, row = self.plan.sources[int(key[0]) >> SOURCE_SHIFT].name, int(key[0]) & (1 << SOURCE_SHIFT) - 1
            self.bad_rows.add(BadRow(name, row, record.column(Column.ID)[0].as_py() or "", t, str(error)))
            return False
        return True

    def _read(self, source: int, rows: np.ndarray) -> pa.Table:
        import pyarrow as pa

        of = self.sources[source]
        table = of.read(rows)
        # A source without these has its name as its task and, beside media, what its sides are as its modality.
        told = {Column.TASK: self.plan.sources[source].name}
        told |= {Column.MODALITY: of.kinds.modality} if self._has_media else {}
        for column, name in told.items():
            if column not in of.columns:
                same = pa.array(np.full(len(rows), text_id(name)))
                table = table.set_column(table.schema.get_field_index(column), column, same)
        return table.select(self.columns)


class Reader(Protocol):
    """Global batch t of a plan, tokenised; pickles."""

    @property
    def plan(self) -> Plan: ...

    def __call__(self, t: int) -> GlobalBatch: ...


def reader_of(
    config: DataConfig,
    plan: Plan,
    sources: Sequence[Rows],
    tokenize: Tokenize,
    bad_rows: BadRows | None = None,
    teacher: Teacher | None = None,
) -> BatchReader:
    """What reads a recipe's batches; bad_rows takes the rows that can't be decoded; none: only the log tells."""
    views, bad_rows = [source.views for source in config.sources], bad_rows or BadRows()
    return BatchReader(plan, sources, tokenize, config.negatives, config.positives, bad_rows, views, teacher)


@dataclass(frozen=True)
class LocalStream:
    """A BatchStream without Ray: every worker reads and tokenises the global batch and keeps its share."""

    reader: Reader
    world_size: int
    rank: int
    budget_tokens: int

    def __call__(self, start: int) -> Iterator[Batch]:
        for t in range(start, self.reader.plan.steps):
            yield share_batch(self.reader(t), self.world_size, self.budget_tokens)[self.rank]


def plan_of(config: DataConfig, sources: Sequence[StoredSource], seed: int) -> Plan:
    """The plan of a recipe over its opened sources, in the order of `config.sources`.

    A source goes by its name in the plan; two different ones of one name by name and name#2.
    """
    shapes: list[SourceShape] = []
    for source, its in zip(sources, config.sources, strict=True):
        same = [s for s in shapes if s.name.split("#")[0] == source.name]
        clash = same and all(s.fingerprint != source.fingerprint for s in same)
        name = f"{source.name}#{len(same) + 1}" if clash else source.name
        groups = RowGroups.of(source.row_groups)
        limit = its.limit(source.rows)
        shapes.append(SourceShape(name, source.rows, groups, source.fingerprint, its.weight_at(0), limit))
    return Plan(
        seed,
        config.batch,
        shapes,
        epochs=config.epochs,
        steps=config.steps,
        mixing_temperature=config.mixing_temperature,
        stages=_stages(config),
        window_groups=config.window_groups,
        ids={s.fingerprint: s for s in sources} if config.duplicates == "avoid" else None,
        neighbours=config.neighbours,
    )


def _stages(config: DataConfig) -> list[Stage]:
    """One for each step at which a stage begins or a source's weight changes."""
    starts = {0, *(stage.from_step for stage in config.stages), *(x for s in config.sources for x in s.weight_steps)}
    stages = []
    for start in sorted(starts):
        told = [stage for stage in config.stages if stage.from_step <= start]
        stage = told[-1] if told else StageConfig()
        own = [w for s in config.sources if (w := s.weight_at(start)) is not None]
        weights = stage.weights or (own if len(own) == len(config.sources) else None)
        homogeneous = config.homogeneous if stage.homogeneous is None else stage.homogeneous
        stages.append(Stage(start, tuple(weights) if weights else None, homogeneous, stage.negatives))
    return stages
