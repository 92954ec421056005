"""Distillation from a teacher's scores or vectors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainers.objectives.sections.numbers import Term


class MarginMSESection(Term):
    """Distils a teacher's score differences of a query's own documents (kind: margin_mse)."""

    kind: Literal["margin_mse"] = "margin_mse"
    scale: float = Field(1.0, gt=0, description="multiplies the similarity, whose margins are below 2 for unit vectors")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores"})


class KLDistillSection(Term):
    """Distils a teacher's distribution over a query's own documents (kind: kl_distill)."""

    kind: Literal["kl_distill"] = "kl_distill"
    temperature: float = Field(0.05, gt=0, description="divides the similarity")
    teacher_temperature: float = Field(1.0, gt=0, description="divides the teacher's scores")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores"})


class VectorTeacher(Term):
    """Distils vectors, of the momentum encoder or of a teacher."""

    teacher: Literal["momentum", "data"] = Field(
        "momentum", description="whose vectors: the momentum encoder's, or those of `data.teacher`"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher_vectors"} if self.teacher == "data" else ())

    @property
    def needs_momentum(self) -> bool:
        return self.teacher == "momentum"


class EmbeddingDistillSection(VectorTeacher):
    """Draws each vector to a teacher's of the same text (kind: embedding_distill)."""

    kind: Literal["embedding_distill"] = "embedding_distill"
    distance: Literal["cosine", "mse"] = Field("cosine", description="1 - cosine, or squared error per dimension")
    of: Literal["queries", "documents", "both"] = Field("both", description="both: every text counts the same")


class SimilarityDistillSection(VectorTeacher):
    """Distils a teacher's distribution over the batch's documents (kind: similarity_distill)."""

    kind: Literal["similarity_distill"] = "similarity_distill"
    temperature: float = Field(0.05, gt=0, description="divides the similarity")
    teacher_temperature: float = Field(0.05, gt=0, description="divides the teacher's similarity")
    tile: int = Field(4096, gt=0, description="candidates scored at once; changes memory, not the result")
