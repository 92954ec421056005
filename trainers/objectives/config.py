"""`objective:` and `terms:`, one section a loss, told apart by `kind`. Every default stands here.

Reading a recipe must not import torch, so the sections are kept apart from the classes that they configure.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

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
        """Columns of the data that it can't do without: scores, labels, tasks, languages, modalities."""
        return frozenset()


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
        0.05, description="divides the similarity; a schedule {start, end}, or {start} alone: learned"
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
    false_negatives: FalseNegatives | None = Field(None, description="hides candidates too close to the positive")
    debiased: Debiased | None = Field(None, description="reweights hard negatives and corrects for false ones")
    harder: float = Field(0.0, ge=0, description="weights each negative by exp(harder * logit), as a constant")
    sampling_correction: bool = Field(False, description="divide by the probability with which it was sampled (logQ)")
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
    hardest_share: float = Field(1.0, gt=0, le=1, description="exact share of the queue, the hardest rows, that counts")
    tile: int = Field(4096, gt=0, description="candidates scored at once; changes memory, not the result")

    @property
    def needs_momentum(self) -> bool:
        by_reference = self.false_negatives is not None and self.false_negatives.reference is not None
        return by_reference or self.positive_encoding == "momentum"

    @property
    def needs(self) -> frozenset[str]:
        labels = self.mask_same_label or (self.positives is not None and self.positives.same_label)
        return frozenset((*self.only_same, *(["labels"] if labels else [])))

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
        return self


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


class EmbeddingDistillSection(Term):
    """Draws each vector to the momentum encoder's of the same text (kind: embedding_distill)."""

    kind: Literal["embedding_distill"] = "embedding_distill"
    distance: Literal["cosine", "mse"] = Field("cosine", description="1 - cosine, or squared error per dimension")
    of: Literal["queries", "documents", "both"] = Field("both", description="both: every text counts the same")

    @property
    def needs_momentum(self) -> bool:
        return True


class SimilarityDistillSection(Term):
    """Distils the momentum encoder's distribution over the batch's documents (kind: similarity_distill)."""

    kind: Literal["similarity_distill"] = "similarity_distill"
    temperature: float = Field(0.05, gt=0, description="divides the similarity")
    teacher_temperature: float = Field(0.05, gt=0, description="divides the momentum encoder's similarity")
    tile: int = Field(4096, gt=0, description="candidates scored at once; changes memory, not the result")

    @property
    def needs_momentum(self) -> bool:
        return True


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


class GradedWeights(Section):
    """`graded_weights:` weights each pair by the grade of its positive (GCL, arXiv:2404.08535)."""

    gain: Literal["linear", "logarithmic", "exponential"] = Field(
        "linear", description="weight y, log2(1 + y) or 2^y - 1 of a grade y"
    )


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
