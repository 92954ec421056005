"""Numbers that change or are learned over a run, and what every loss's section has."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

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


class Piece(Section):
    """What a number is from some point of the run on."""

    after: float = Field(ge=0, lt=1, description="share of the run that is done; 0 for the first piece")
    value: float = Field(description="from there on, to the next piece")


class Pieces(Section):
    """A number that stays as it is and then changes at once: what population based training finds."""

    pieces: list[Piece] = Field(min_length=1, description="its values, in order")

    @field_validator("pieces")
    @classmethod
    def _ascend(cls, pieces: list[Piece]) -> list[Piece]:
        starts = [piece.after for piece in pieces]
        if starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
            raise ValueError(f"they begin after {starts} of the run: the first after 0, each later one after the last")
        return pieces

    def at(self, progress: float) -> float:
        """Its value when `progress` (0 to 1) of the run is done."""
        return [piece.value for piece in self.pieces if piece.after <= progress][-1]


class Learned(Section):
    """A number that is trained with the weights."""

    start: float = Field(description="its first value")


Number = float | Schedule | Pieces


def value_at(number: Number, progress: float) -> float:
    """A number or schedule when `progress` of the run is done."""
    return number if isinstance(number, int | float) else number.at(progress)


def ends_of(number: Number | Learned) -> list[float]:
    """The values between which it stays, its first one first; of a learned one that is all that is known."""
    match number:
        case Schedule():
            return [number.start, number.end]
        case Pieces():
            return [piece.value for piece in number.pieces]
        case Learned():
            return [number.start]
    return [number]


def _above_zero(number: Number | Learned) -> Number | Learned:
    least = min(ends_of(number))
    if least <= 0:
        raise ValueError(f"a temperature of {least:g} is none to divide by: give one above 0")
    return number


def _a_rate(number: float | Pieces) -> float | Pieces:
    if (least := min(ends_of(number))) <= 0:
        raise ValueError(f"a rate of {least:g} teaches nothing: give one above 0")
    return number


def _a_share(number: Number) -> Number:
    if wrong := next((value for value in ends_of(number) if not 0 < value <= 1), None):
        raise ValueError(f"a share is above 0 and at most 1, not {wrong:g}")
    return number


Temperature = Annotated[Number, AfterValidator(_above_zero)]
LearnedTemperature = Annotated[Number | Learned, AfterValidator(_above_zero)]
Rate = Annotated[float | Pieces, AfterValidator(_a_rate)]
Share = Annotated[Number, AfterValidator(_a_share)]


class Term(Section):
    """What every loss has."""

    weight: Number = Field(1.0, description="of this term in the sum; a number, or a schedule {start, end} or {pieces}")

    @property
    def needs_momentum(self) -> bool:
        """Whether the loss compares the momentum encoder's vectors of the batch."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """Columns of the data that it can't do without: scores, labels, tasks, languages, modalities, and
        teacher_vectors."""
        return frozenset()
