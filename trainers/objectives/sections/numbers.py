"""Numbers that change or are learned over a run, and what every loss's section has."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from data_services.schema import Section


class Schedule(Section):
    """A number that changes over the run."""

    start: float = Field(description="its value at the first step")
    end: float = Field(description="its value at the end")
    shape: Literal["linear", "cosine"] = Field("linear", description="of the way between them")
    until: float = Field(1.0, gt=0, le=1, description="share of the run after which it stays at `end`")

    def at(self, progress: float) -> float:
        """Its value when `progress` (0 to 1) of the run is done."""
        way = min(progress / self.until, 1.0)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.end - self.start) * way


class Learned(Section):
    """A number that is trained with the weights."""

    start: float = Field(description="its first value")


Number = float | Schedule


def value_at(number: Number, progress: float) -> float:
    """A number or schedule when `progress` of the run is done."""
    return number.at(progress) if isinstance(number, Schedule) else number


def _above_zero(number: Number | Learned) -> Number | Learned:
    if isinstance(number, Schedule):
        least = min(number.start, number.end)
    else:
        least = number.start if isinstance(number, Learned) else number
    if least <= 0:
        raise ValueError(f"a temperature of {least:g} is none to divide by: give one above 0")
    return number


Temperature = Annotated[Number, AfterValidator(_above_zero)]
LearnedTemperature = Annotated[Number | Learned, AfterValidator(_above_zero)]


class Term(Section):
    """What every loss has."""

    weight: Number = Field(1.0, description="of this term in the sum; a number, or a schedule {start, end}")

    @property
    def needs_momentum(self) -> bool:
        """Whether the loss compares the momentum encoder's vectors of the batch."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """Columns of the data that it can't do without: scores, labels, tasks, languages, modalities, and
        teacher_vectors."""
        return frozenset()
