"""Losses over graded documents: their order, or their list."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainers.objectives.sections.numbers import Temperature, Term


class CosentSection(Term):
    """Orders all graded pairs of the batch by their cosine (kind: cosent). Needs scores in the data."""

    kind: Literal["cosent"] = "cosent"
    temperature: Temperature = Field(0.05, description="divides the similarity; Sentence Transformers' scale is 1/this")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores"})


class AngleSection(Term):
    """Orders all graded pairs of the batch by an angle in complex space (kind: angle). Needs scores in the data."""

    kind: Literal["angle"] = "angle"
    temperature: Temperature = Field(0.05, description="divides the similarity; Sentence Transformers' scale is 1/this")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores"})


class ListwiseSection(Term):
    """What losses have that order each query's own graded documents. They need scores in the data."""

    kind: str
    temperature: Temperature = Field(0.05, description="divides the similarity")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores"})


class ListMLESection(ListwiseSection):
    """Likelihood of the graded order, document by document (kind: listmle)."""

    kind: Literal["listmle"] = "listmle"


class ListNetSection(ListwiseSection):
    """Cross-entropy of the grades' soft-max and the similarities' (kind: listnet)."""

    kind: Literal["listnet"] = "listnet"
    grade_temperature: float = Field(1.0, gt=0, description="divides the grades")


class RankNetSection(ListwiseSection):
    """Logistic loss of each pair of documents with different grades (kind: ranknet)."""

    kind: Literal["ranknet"] = "ranknet"


class LambdaRankSection(ListwiseSection):
    """The same, pairs weighted by what they change in nDCG (kind: lambdarank)."""

    kind: Literal["lambdarank"] = "lambdarank"
    bound: Literal["lambdarank", "ndcg2", "ndcg2++"] = Field("lambdarank", description="which weight of a pair")
    mu: float = Field(10.0, ge=0, description="weight of ndcg2 within ndcg2++")
    top: int | None = Field(None, gt=0, description="k of the nDCG@k that is bounded; None: all documents")
    gain: Literal["exponential", "linear"] = Field("exponential", description="2^grade - 1, or the grade")
