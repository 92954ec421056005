"""`objective:` and `terms:`, one section a loss, told apart by `kind`. Every default stands here.

Reading a recipe must not import torch, so the sections are kept apart from the classes that they configure.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_services.schema import Section


class Schedule(Section):
    """A number that changes over the run."""

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"
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


class Term(Section):
    """What every loss has."""

    weight: Number = Field(1.0, description="of this term in the sum; a number, or a schedule {start, end}")
