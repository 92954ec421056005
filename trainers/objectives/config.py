"""`objective:` and `terms:`, one section a loss, told apart by `kind`. Every default stands in `sections/`.

Reading a recipe must not import torch, so the sections are kept apart from the classes that they configure.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.objectives.sections.distill import (
    EmbeddingDistillSection,
    KLDistillSection,
    MarginMSESection,
    SimilarityDistillSection,
)
from trainers.objectives.sections.graded import (
    AngleSection,
    CosentSection,
    LambdaRankSection,
    ListMLESection,
    ListNetSection,
    RankNetSection,
)
from trainers.objectives.sections.numbers import Term
from trainers.objectives.sections.pairwise import EnergyHingeSection, SigmoidSection, TripletSection
from trainers.objectives.sections.terms import AlignmentSection, KoLeoSection, SpreadOutSection, UniformitySection


class CustomSection(Term):
    """A loss of your own (kind: custom), see docs/extending.md."""

    kind: Literal["custom"] = "custom"
    path: str = Field(description="package.module:Name, called with (this section, group)")
    options: dict[str, Any] = Field({}, description="whatever it reads from here")
    momentum: bool = Field(False, description="whether it compares the momentum encoder's vectors")

    @property
    def needs_momentum(self) -> bool:
        return self.momentum


AnyTerm = Annotated[
    ContrastiveSection
    | SigmoidSection
    | TripletSection
    | EnergyHingeSection
    | CosentSection
    | AngleSection
    | ListMLESection
    | ListNetSection
    | RankNetSection
    | LambdaRankSection
    | MarginMSESection
    | KLDistillSection
    | EmbeddingDistillSection
    | SimilarityDistillSection
    | AlignmentSection
    | UniformitySection
    | SpreadOutSection
    | KoLeoSection
    | CustomSection,
    Field(discriminator="kind"),
]


def _contrastive_unless_said(section: Any) -> Any:
    return {"kind": "contrastive", **section} if isinstance(section, dict) else section


MainTerm = Annotated[AnyTerm, BeforeValidator(_contrastive_unless_said)]
