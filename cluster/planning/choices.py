"""ZeRO stage, offload and LoRA: what each would take, and the cheapest of those that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.planning.memory import RESERVE, Memory, largest_budget, memory_of
from cluster.planning.speed import Machine, StepTime, seconds_per_step
from cluster.planning.traffic import messages, wire_bytes
from cluster.planning.workload import Workload

LORA_RANK = 32
"""Of the LoRA choices of a recipe that has no adapter."""


@dataclass(frozen=True)
class Choice:
    """What a way of training would take on each GPU.

    budget_tokens  the largest that fits, 0: none does; figures are of the recipe's budget where that fits, else of
                   this one (of the recipe's, too, where none does)
    """

    workload: Workload
    memory: Memory
    wire: dict[str, float]
    messages: int
    time: StepTime
    budget_tokens: int
    fits: bool

    def overrides(self, written: Workload) -> str:
        """What `gyre train` is given to do this with the recipe that `written` is of."""
        of, told = self.workload, []
        if of.zero_stage != written.zero_stage:
            told.append(f"engine.zero_stage={of.zero_stage}")
        if of.offload != written.offload:
            told.append(f"engine.offload={'cpu' if of.offload else 'none'}")
        if of.budget_tokens != written.budget_tokens:
            told.append(f"engine.budget_tokens={of.budget_tokens}")
        if of.cached != written.cached:
            told.append(f"engine.caching={'on' if of.cached else 'off'}")
        if of.adapter_rank != written.adapter_rank:
            told.append("model.adapter=null" if of.adapter_rank is None else f"model.adapter.rank={of.adapter_rank}")
        return " ".join(told)

    @property
    def name(self) -> str:
        of = self.workload
        weights = "every weight" if of.adapter_rank is None else f"LoRA of rank {of.adapter_rank}"
        return f"{weights}, ZeRO-{of.zero_stage}{', offload' if of.offload else ''}"


def choice(of: Workload, on: Machine, memory_bytes: float, shortest: int) -> Choice:
    """shortest: tokens that a chunk must hold at least, one text."""
    largest = largest_budget(of, memory_bytes)
    fits = largest >= shortest
    if fits and largest < of.budget_tokens:
        of = replace(of, budget_tokens=largest, cached=True)
    elif fits and memory_of(of).peak > memory_bytes * (1 - RESERVE):
        of = replace(of, cached=True)  # graphs of the whole batch don't fit, a chunk's do
    return Choice(of, memory_of(of), wire_bytes(of), messages(of), seconds_per_step(of, on), largest, fits)


def choices(of: Workload, on: Machine, memory_bytes: float, shortest: int) -> list[Choice]:
    """Every ZeRO stage, with offload where there is something to offload, of every weight and of LoRA."""
    return [choice(one, on, memory_bytes, shortest) for one in _ways(of)]


def _ways(of: Workload) -> Iterator[Workload]:
    for rank in (None, of.adapter_rank or LORA_RANK):
        trained = replace(of, adapter_rank=rank)
        for stage, offload in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True)):
            per_chunk = stage >= 2 and (of.per_chunk or 4 * trained.trained > WHOLE_GRADIENT_BYTES)
            yield replace(trained, zero_stage=stage, offload=offload, per_chunk=per_chunk)


WHOLE_GRADIENT_BYTES = 4_000_000_000
"""`engine.gradient_bytes` at its default: `engine.reduction: auto` keeps whole gradients up to it."""


def cheapest(found: Sequence[Choice]) -> Choice | None:
    """The one of fewest seconds a step that fits; of equals the lowest stage. None where none fits."""
    fitting = [one for one in found if one.fits]
    return min(fitting, key=lambda one: (one.time.total, one.workload.zero_stage)) if fitting else None
