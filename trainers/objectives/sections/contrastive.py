"""`kind: contrastive`, InfoNCE and its family."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_services.schema import Section
from trainers.objectives.sections.numbers import LearnedTemperature, Share, Term


class Positives(Section):
    """`positives:` which other candidates, on any worker, are positives of a query beside its own."""

    same_document: bool = Field(False, description="the query's positive in another row")
    same_query: bool = Field(False, description="documents that answer an equal query")
    same_label: bool = Field(False, description="candidates of the query's label (SupCon)")
    sum: Literal["outside", "inside"] = Field(
        "outside", description="mean of the positives' log-probabilities, or logarithm of their summed probability"
    )

    @model_validator(mode="after")
    def _some(self) -> Positives:
        if not (self.same_document or self.same_query or self.same_label):
            raise ValueError("set one of same_document, same_query and same_label, or leave `positives` out")
        return self


class Alike(Section):
    """One of `soft_targets.alike:` labels that are like each other, every two of them."""

    labels: tuple[str | int, ...] = Field(min_length=2, description="as the data has them")
    similarity: float = Field(gt=0, le=1, description="1: as good as the same label")


class SoftTargets(Section):
    """`soft_targets:` candidates that answer a query in part: as far as their labels are like, or as scores say."""

    alike: tuple[Alike, ...] = Field(
        (), description="labels and how like they are; a label is like itself by 1, like any that isn't named by 0"
    )
    scores: bool = Field(
        False,
        description="a query's own documents are targets by their scores, 0 or more; unscored, its positive by 1",
    )

    @model_validator(mode="after")
    def _some(self) -> SoftTargets:
        if not (self.alike or self.scores):
            raise ValueError("say which labels are `alike`, or set `scores`, or leave `soft_targets` out")
        return self


class FalseNegatives(Section):
    """`false_negatives:` hides candidates that score too close to the query's positive. Exactly one key."""

    margin: float | None = Field(None, description="hide what scores above the positive's similarity less this")
    share: float | None = Field(
        None, gt=0, description="hide what scores above this share of the positive's similarity, 0.95 say"
    )
    reference: float | None = Field(
        None, gt=-1, lt=1, description="hide what the momentum encoder finds more similar to the query than this"
    )

    @model_validator(mode="after")
    def _one(self) -> FalseNegatives:
        if sum(x is not None for x in (self.margin, self.share, self.reference)) != 1:
            raise ValueError("give exactly one of `margin`, `share` and `reference`")
        return self


class Debiased(Section):
    """`debiased:` negatives reweighted towards hard ones and corrected for false ones (arXiv:2010.04592)."""

    concentration: float = Field(1.0, ge=0, description="beta: 0 is the debiased loss without reweighting")
    positive_share: float = Field(0.1, ge=0, lt=1, description="tau+: chance that a negative is a positive")


class ContrastiveSection(Term):
    """`objective:` InfoNCE and its family, over the global batch and the queue (kind: contrastive)."""

    kind: Literal["contrastive"] = "contrastive"
    temperature: LearnedTemperature = Field(
        0.05, description="divides the similarity; a schedule, {start, end} or {pieces}; {start} alone: learned"
    )
    similarity: Literal["inner_product", "squared_distance", "max_sim"] = Field(
        "inner_product", description="max_sim: late interaction, for model.pooling: tokens"
    )
    directions: Literal["both", "query_to_document"] = Field(
        "both", description="queries among candidates, and positives among queries too"
    )
    normalisation: Literal["separate", "joint"] = Field(
        "separate", description="joint: both directions, and what `among` adds, in one denominator"
    )
    among_queries: bool = Field(False, description="other queries in a query's denominator (GTE, Qwen3-Embedding)")
    among_documents: bool = Field(False, description="other positives in a positive's denominator")
    decoupled: bool = Field(False, description="leave the positive out of the denominator (DCL)")
    von_mises_fisher: float | None = Field(
        None, gt=0, description="sigma: weight the positives by 2 - exp(s/sigma) / mean (DCLW)"
    )
    additive_margin: float = Field(0.0, ge=0, lt=2, description="taken off the positive's similarity")
    angular_margin: float = Field(0.0, ge=0, lt=1.6, description="radians added to the positive's angle")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all candidates")
    positives: Positives | None = Field(None, description="None: only a query's own")
    soft_targets: SoftTargets | None = Field(
        None, description="targets between 0 and 1, by how like labels are or by scores; None: the positive's is 1"
    )
    false_negatives: FalseNegatives | None = Field(None, description="hides candidates too close to the positive")
    debiased: Debiased | None = Field(None, description="reweights hard negatives and corrects for false ones")
    harder: float = Field(0.0, ge=0, description="weights each negative by exp(harder * logit), as a constant")
    sampling_correction: bool = Field(
        False, description="divide a negative's exponential by how often it is drawn (logQ), data.sources.frequency"
    )
    mask_same_document: bool = Field(True, description="a candidate equal to the query's positive is no negative")
    mask_same_query: bool = Field(True, description="a document of an equal query is no negative")
    mask_same_label: bool = Field(False, description="a candidate of the query's label is no negative")
    only_same: tuple[Literal["tasks", "languages", "modalities"], ...] = Field(
        (), description="only candidates of the query's own task, language or modality are negatives"
    )
    batch_negatives: Literal["all", "own", "none"] = Field(
        "all",
        description="negatives from the batch: every worker's documents, a query's own hard negatives, or none: the "
        "queue's alone (MoCo, Contriever)",
    )
    ignore_unrelated: bool = Field(
        False, description="only a query's own hard negatives are negatives; how other pairs relate isn't known"
    )
    positive_encoding: Literal["online", "momentum"] = Field(
        "online", description="which encoding of its positive a query is drawn to"
    )
    hardest_share: Share = Field(
        1.0, description="exact share of the queue, the hardest rows, that counts: above 0, at most 1; or a schedule"
    )
    tile: int = Field(4096, gt=0, description="candidates scored at once; changes memory, not the result")

    @property
    def needs_momentum(self) -> bool:
        by_reference = self.false_negatives is not None and self.false_negatives.reference is not None
        return by_reference or self.positive_encoding == "momentum"

    @property
    def needs(self) -> frozenset[str]:
        positives, soft = self.positives, self.soft_targets
        labels = self.mask_same_label or bool((positives and positives.same_label) or (soft and soft.alike))
        more = ["labels"] * labels + ["frequencies"] * self.sampling_correction
        more += ["scores"] * bool(soft and soft.scores)
        return frozenset((*self.only_same, *more))

    @model_validator(mode="after")
    def _can_be_combined(self) -> ContrastiveSection:
        if (self.among_documents or self.among_queries) and self.normalisation == "separate":
            raise ValueError("among_queries and among_documents share one denominator: set `normalisation: joint`")
        if self.normalisation == "joint" and (self.positives or self.label_smoothing or self.debiased):
            raise ValueError("normalisation: joint has one positive and hard targets: remove the other key")
        if self.debiased and (self.positives or self.label_smoothing or self.decoupled or self.harder):
            raise ValueError("debiased has its own denominator: remove positives, label_smoothing, decoupled, harder")
        if self.positives and (self.decoupled or self.von_mises_fisher or self.label_smoothing):
            raise ValueError("positives goes with neither decoupled, von_mises_fisher nor label_smoothing")
        beside = ("positives", "decoupled", "von_mises_fisher", "label_smoothing", "debiased", "harder")
        if self.soft_targets and (set_too := next((name for name in beside if getattr(self, name)), None)):
            raise ValueError(f"soft_targets says all of what a target is: remove {set_too}")
        if self.soft_targets and self.normalisation == "joint":
            raise ValueError("soft_targets has a target in each direction: set `normalisation: separate`")
        return self
