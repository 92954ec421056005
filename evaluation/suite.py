"""A suite, as YAML has it: which tasks, over which data, by which metrics. docs/evaluation.md has an example of each.

Data is named as in a recipe's `data.sources`, but read whole and strictly: a malformed row is an error.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from data_services.schema import Section
from evaluation.metrics import parse_metric, ranking_metrics
from evaluation.retrieval import BM25Config
from evaluation.tasks.labels import Classification, Clustering, ZeroShot
from evaluation.tasks.pairs import STS, BitextMining, PairClassification
from evaluation.vectors import Side, Variant

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"


class TaskSection(Section):
    """What every task has."""

    name: str = Field(pattern=_NAME, description="unique in the suite; names the task in every table")
    data: str | list[str] = Field(min_length=1, description="as a path in data.sources")
    split: str | None = Field(None, description="of a folder, hub or built-in source; none: test. A file has none")
    metrics: list[str] = Field([], description="the main one first; none: all that the kind has")

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            cls.check_metric(name)
        if len(set(names)) < len(names):
            raise ValueError(f"metrics names one twice: {', '.join(names)}")
        return names

    @classmethod
    def known_metrics(cls) -> tuple[str, ...]:
        raise NotImplementedError

    @classmethod
    def check_metric(cls, name: str) -> None:
        if name not in cls.known_metrics():
            raise ValueError(nearest("metric", name, cls.known_metrics()))

    @property
    def asked(self) -> tuple[str, ...]:
        return tuple(self.metrics) or self.known_metrics()


class _Ranking(TaskSection):
    bm25: BM25Config = Field(BM25Config(), description="the lexical baseline in the task's table")

    @classmethod
    def known_metrics(cls) -> tuple[str, ...]:
        return ranking_metrics()

    @classmethod
    def check_metric(cls, name: str) -> None:
        parse_metric(name)


class RetrievalSection(_Ranking):
    """Every query against a whole corpus, searched exactly."""

    kind: Literal["retrieval"]
    query: str | None = Field(None, description="field of the query; none: as the source's layout has it")
    positive: str | None = Field(None, description="field of the relevant text, or list of them")
    language: str | None = Field(None, description="field of its language: the scores are given for each, too")
    unanswered: Literal["refuse", "leave_out"] = Field(
        "refuse", description="what happens where a query has no relevant document"
    )


class RerankingSection(_Ranking):
    """Each query's own candidates, in the best order."""

    kind: Literal["reranking"]
    query: str = Field("query", description="field of the query")
    positive: str = Field("positive", description="field of the relevant text, or list of them")
    language: str | None = Field(None, description="field of its language: the scores are given for each, too")
    negatives: str = Field("negatives", description="field of the irrelevant ones")


class _Pair(TaskSection):
    first: str = Field("sentence1", description="field of one text")
    second: str = Field("sentence2", description="field of the other")
    side: Side = Field("query", description="how both are encoded: whose prompt they get")


class STSSection(_Pair):
    """Do similarities order pairs as people did?"""

    kind: Literal["sts"]
    score: str = Field("score", description="field of the graded similarity")

    @classmethod
    def known_metrics(cls) -> tuple[str, ...]:
        return STS.METRICS


class PairClassificationSection(_Pair):
    """Do two texts belong together?"""

    kind: Literal["pair_classification"]
    label: str = Field("label", description="field of 1 (they do) or 0")

    @classmethod
    def known_metrics(cls) -> tuple[str, ...]:
        return PairClassification.METRICS


class BitextMiningSection(_Pair):
    """Is the translation of a text the nearest one?"""

    kind: Literal["bitext_mining"]
    language: str | None = Field(None, description="field of its language: the scores are given for each, too")

    @classmethod
    def known_metrics(cls) -> tuple[str, ...]:
        return BitextMining.METRICS


class _Labelled(TaskSection):
    text: str = Field("text", description="field of the text")
    label: str = Field("label", description="field of its label")
    labels: list[str] = Field([], description="rows with another label are left out; none: all labels are used")
    side: Side = Field("query", description="how texts are encoded: whose prompt they get")


class ClassificationSection(_Labelled):
    """A linear probe and nearest neighbours, learned on the training split's vectors."""

    kind: Literal["classification"]
    language: str | None = Field(None, description="field of its language: the scores are given for each, too")
    train: str | list[str] | None = Field(None, min_length=1, description="data to learn from; none: the same data's")
    train_split: str | None = Field(None, description="split of it; none: train")
    neighbours: int = Field(5, ge=1, description="k of the nearest neighbours")

    @classmethod
    def known_metrics(cls) -> tuple[str, ...]:
        return Classification.METRICS


class ZeroShotSection(_Labelled):
    """The label whose own text is nearest."""

    kind: Literal["zero_shot"]
    language: str | None = Field(None, description="field of its language: the scores are given for each, too")
    template: str = Field("{}", description="what is encoded for a label, {} its name")
    names: dict[str, str] = Field({}, description="a label's name in the template, where it isn't the label")

    @model_validator(mode="after")
    def _has_place(self) -> ZeroShotSection:
        if "{}" not in self.template:
            raise ValueError(f"template {self.template!r} has no {{}} for the label's name")
        return self

    @classmethod
    def known_metrics(cls) -> tuple[str, ...]:
        return ZeroShot.METRICS


class ClusteringSection(_Labelled):
    """k-means with as many clusters as labels."""

    kind: Literal["clustering"]
    repeats: int = Field(10, ge=1, description="runs from other starts, whose mean is reported")

    @classmethod
    def known_metrics(cls) -> tuple[str, ...]:
        return Clustering.METRICS


AnyTask = Annotated[
    RetrievalSection
    | RerankingSection
    | STSSection
    | PairClassificationSection
    | BitextMiningSection
    | ClassificationSection
    | ZeroShotSection
    | ClusteringSection,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[TaskSection]] = {
    get_args(section.model_fields["kind"].annotation)[0]: section for section in get_args(get_args(AnyTask)[0])
}


class Suite(Section):
    """Tasks that a model is scored on together."""

    name: str = Field(pattern=_NAME)
    tasks: list[AnyTask] = Field(min_length=1)
    bias: bool = Field(False, description="association tests over the word sets that come with gyre (English)")
    variants: list[Variant] = Field([], description="ways of using the model that every task is scored with, too")

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        for what, names in (("tasks", [t.name for t in self.tasks]), ("variants", [v.name for v in self.variants])):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice:
                raise ValueError(f"two of {what} are called {twice!r}")
        return self


def nearest(what: str, name: str, known: tuple[str, ...]) -> str:
    """ "metric 'ndgc' is not known: did you mean 'ndcg'? there are …" """
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{what} {name!r} is not known: did you mean {near!r}? There are {', '.join(known)}"
