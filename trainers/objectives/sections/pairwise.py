"""Losses over scored pairs that aren't a soft-max."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainers.objectives.sections.numbers import Learned, LearnedTemperature, Number, Term


class AmongCandidatesSection(Term):
    """What losses have that compare a query with all candidates: the batch's documents and the queue's."""

    mask_same_document: bool = Field(True, description="a candidate equal to the query's positive is no negative")
    mask_same_query: bool = Field(True, description="a document of an equal query is no negative")
    mask_same_label: bool = Field(False, description="a candidate of the query's label is no negative")
    queue: bool = Field(True, description="the queue's documents are negatives too, where the run has a queue")
    tile: int = Field(4096, gt=0, description="candidates scored at once; changes memory, not the result")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"labels"} if self.mask_same_label else ())


class SigmoidSection(AmongCandidatesSection):
    """Each pair by itself belongs together or doesn't, SigLIP (kind: sigmoid)."""

    kind: Literal["sigmoid"] = "sigmoid"
    temperature: LearnedTemperature = Field(
        Learned(start=0.1), description="divides the similarity; {start: …} alone is learned"
    )
    bias: Number | Learned = Field(
        Learned(start=-10.0), description="added to the logit, low as few pairs belong together; {start: …} is learned"
    )


class TripletSection(AmongCandidatesSection):
    """The positive is nearer than a negative by a margin (kind: triplet)."""

    kind: Literal["triplet"] = "triplet"
    mining: Literal["own", "batch_hard", "semi_hard", "batch_all"] = Field(
        "batch_hard", description="negatives: a query's own, the nearest, the nearest beyond the positive, or all"
    )
    similarity: Literal["distance", "squared_distance", "inner_product"] = Field(
        "distance", description="what the margin is of; both distances are negated"
    )
    margin: float | None = Field(0.2, gt=0, description="in units of the similarity; None: soft, log(1 + exp(.))")

    @model_validator(mode="after")
    def _margin_of_all(self) -> TripletSection:
        if self.mining == "batch_all" and self.margin is None:
            raise ValueError("mining: batch_all leaves out triplets without a loss, which a soft margin has none of")
        return self


class EnergyHingeSection(AmongCandidatesSection):
    """The positive is nearer than the hardest negative by a margin, PromCSE (kind: energy_hinge)."""

    kind: Literal["energy_hinge"] = "energy_hinge"
    margin: float = Field(0.2, gt=0, description="of the cosine")
