"""Terms over the batch's embeddings alone, mostly beside another loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trainers.objectives.sections.numbers import Term


class AlignmentSection(Term):
    """Draws a query to its positive (kind: alignment)."""

    kind: Literal["alignment"] = "alignment"
    power: float = Field(2.0, ge=1, description="of their distance")


class AmongTextsSection(Term):
    """What losses have that compare each text with every other of the global batch."""

    of: Literal["queries", "documents", "both"] = Field("both", description="documents: the positives; both: the mean")
    tile: int = Field(4096, gt=0, description="texts compared at once; changes memory, not the result")


class UniformitySection(AmongTextsSection):
    """Spreads texts evenly over the sphere (kind: uniformity)."""

    kind: Literal["uniformity"] = "uniformity"
    sharpness: float = Field(2.0, gt=0, description="t: multiplies the squared distance")


class SpreadOutSection(AmongTextsSection):
    """Makes different texts as good as orthogonal (kind: spread_out)."""

    kind: Literal["spread_out"] = "spread_out"
    first_moment: float = Field(1.0, ge=0, description="weight of the squared mean similarity")
    second_moment: float = Field(1.0, ge=0, description="weight of the mean squared similarity above 1/D")

    @model_validator(mode="after")
    def _some(self) -> SpreadOutSection:
        if not (self.first_moment or self.second_moment):
            raise ValueError("first_moment and second_moment are both 0: set one of them")
        return self


class KoLeoSection(AmongTextsSection):
    """Drives each text from the nearest other one (kind: koleo)."""

    kind: Literal["koleo"] = "koleo"
