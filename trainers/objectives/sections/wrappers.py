"""What lies around the losses, and the auxiliary head."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_services.schema import Section
from trainers.objectives.sections.numbers import Number


class Matryoshka(Section):
    """`matryoshka:` the objective also on the leading dimensions of the vectors, normalised again."""

    dims: tuple[int, ...] = Field(min_length=1, description="lengths of the prefixes, the model's own among them")
    weights: tuple[float, ...] | None = Field(None, description="of each prefix in the sum; None: 1 each")

    @model_validator(mode="after")
    def _one_weight_each(self) -> Matryoshka:
        if min(self.dims) < 1 or len(set(self.dims)) < len(self.dims):
            raise ValueError(f"dims are {list(self.dims)}: give different numbers greater than 0")
        if self.weights is not None and len(self.weights) != len(self.dims):
            raise ValueError(f"{len(self.weights)} weights for {len(self.dims)} dims: give one each")
        _not_negative(self.weights)
        return self


class Layers(Section):
    """`layers:` the objective on the vectors of all of `model.layers`; the earlier ones also follow the last."""

    weights: tuple[float, ...] | None = Field(
        None, description="of each earlier layer's loss, in the order of model.layers; None: equal, 1 together"
    )
    last_weight: float = Field(1.0, ge=0, description="of the last layer's loss")
    kl_weight: float = Field(1.0, ge=0, description="of the divergence from the last layer's vector; 0 turns it off")
    kl_temperature: float = Field(0.3, gt=0, description="divides the vectors' components before their soft-max")

    @model_validator(mode="after")
    def _weigh(self) -> Layers:
        _not_negative(self.weights)
        return self


def _not_negative(weights: tuple[float, ...] | None) -> None:
    if weights is not None and min(weights) < 0:
        raise ValueError(f"weights are {list(weights)}: none may be negative")


class MaskedLM(Section):
    """`masked_lm:` an auxiliary loss on token states: hidden tokens are predicted from their context."""

    weight: Number = Field(0.1, description="of this loss in the sum; a number, or a schedule {start, end}")
    share: float = Field(0.15, gt=0, lt=1, description="of a text's tokens that are predicted")
    masked: float = Field(0.8, ge=0, le=1, description="share of those that the mask token replaces")
    random: float = Field(0.1, ge=0, le=1, description="share of those that any token replaces; the rest stay")

    @model_validator(mode="after")
    def _shares(self) -> MaskedLM:
        if self.masked + self.random > 1:
            raise ValueError(f"masked ({self.masked}) and random ({self.random}) add up to more than 1: lower one")
        return self


class GradedWeights(Section):
    """`graded_weights:` weights each pair by the grade of its positive (GCL, arXiv:2404.08535)."""

    gain: Literal["linear", "logarithmic", "exponential"] = Field(
        "linear", description="weight y, log2(1 + y) or 2^y - 1 of a grade y"
    )
