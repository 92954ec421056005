"""`gyre plan`: a recipe on a cluster that may not exist yet."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.config import Recipe
from cluster.planning.activations import graph_bytes
from cluster.planning.choices import Choice, cheapest, choice, choices
from cluster.planning.hardware import UTILISATION, fabric, gpu
from cluster.planning.memory import GIB, RESERVE
from cluster.planning.shapes import shape_of
from cluster.planning.speed import Machine
from cluster.planning.workload import Texts, Workload
from data_services.schema import Refused, UsageError
from trainers.objectives.sections.contrastive import ContrastiveSection

MAX_TOKENS = 192
"""`model.max_tokens` of a model that says nothing (trainers/config.py)."""


@dataclass(frozen=True)
class Cluster:
    """What is planned for.

    memory_bytes   of one GPU; None: what `gpu` has
    query_tokens, document_tokens  mean tokens of a text; None: model.max_tokens
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h100"
    memory_bytes: float | None = None
    fabric: str = "ndr"
    utilisation: float = UTILISATION
    query_tokens: float | None = None
    document_tokens: float | None = None


@dataclass(frozen=True)
class Plan:
    """as_written: the recipe as it stands; full, lora: the cheapest of training every weight and of LoRA that fit.

    memory_bytes   of a GPU, of which `usable_bytes` are planned with
    assumptions    what was taken as given, in sentences
    """

    cluster: Cluster
    memory_bytes: float
    as_written: Choice
    found: list[Choice]
    full: Choice | None
    lora: Choice | None
    assumptions: list[str]

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * (1 - RESERVE)

    @property
    def advised(self) -> Choice | None:
        """The recipe's own kind of training where some way of it fits, else the other kind."""
        wants_lora = self.as_written.workload.adapter_rank is not None
        return (self.lora or self.full) if wants_lora else (self.full or self.lora)

    def as_dict(self) -> dict[str, Any]:
        return {
            "cluster": asdict(self.cluster),
            "memory_bytes": self.memory_bytes,
            "usable_bytes": self.usable_bytes,
            "as_written": self._told(self.as_written),
            "choices": [self._told(one) for one in self.found],
            "cheapest": {kind: one and self._told(one) for kind, one in (("full", self.full), ("lora", self.lora))},
            "advised": self.advised and self._told(self.advised),
            "assumptions": self.assumptions,
        }

    def _told(self, one: Choice) -> dict[str, Any]:
        return {
            "name": one.name,
            "fits": one.fits,
            "overrides": one.overrides(self.as_written.workload) if one.fits else None,
            "largest_budget_tokens": one.budget_tokens,
            "memory": one.memory.as_dict(),
            "wire_bytes": one.wire,
            "messages": one.messages,
            "seconds": one.time.as_dict(),
            "workload": asdict(one.workload),
        }


def plan(recipe: Recipe, cluster: Cluster) -> Plan:
    """What the recipe takes there as it is written, and every other ZeRO stage, offload and LoRA beside it.

    Raises UsageError for a model whose sizes aren't known, or that isn't one text tower with a vector a text.
    """
    of, machine = workload_of(recipe, cluster), machine_of(cluster)
    memory = machine.gpu.memory_bytes if cluster.memory_bytes is None else cluster.memory_bytes
    shortest = recipe.model.max_tokens or MAX_TOKENS
    found = choices(of, machine, memory, shortest)
    return Plan(
        cluster=cluster,
        memory_bytes=memory,
        as_written=choice(of, machine, memory, shortest),
        found=found,
        full=cheapest([one for one in found if one.workload.adapter_rank is None]),
        lora=cheapest([one for one in found if one.workload.adapter_rank is not None]),
        assumptions=_assumptions(recipe, cluster),
    )


def check_fits(plan: Plan) -> None:
    """Raises Refused where no way of training the recipe fits."""
    if plan.advised is None:
        least = min(plan.found, key=lambda one: one.memory.peak)
        raise Refused(
            f"nothing fits: {least.name} takes least, {least.memory.peak / GIB:.1f} GiB where "
            f"{plan.usable_bytes / GIB:.1f} are there; add nodes, lower queue.rows or data.batch, or set "
            "model.gradient_checkpointing=true"
        )


def machine_of(cluster: Cluster) -> Machine:
    return Machine(gpu(cluster.gpu), fabric(cluster.fabric), cluster.utilisation)


def workload_of(recipe: Recipe, cluster: Cluster) -> Workload:
    """The recipe's step on the cluster's GPUs, one worker on each, in bf16 unless it says fp32."""
    model, engine, gpus = recipe.model, recipe.engine, cluster.nodes * cluster.gpus_per_node
    if model.pooling == "tokens":
        raise UsageError("gyre plan counts one vector a text: model.pooling is tokens")
    if recipe.data.batch < gpus:
        raise UsageError(f"data.batch={recipe.data.batch} leaves some of {gpus} GPUs without a query: raise it")
    shape, longest = shape_of(model), model.max_tokens or MAX_TOKENS
    texts = Texts(
        query_tokens=cluster.query_tokens or longest,
        document_tokens=cluster.document_tokens or longest,
        documents=recipe.data.positives + recipe.data.most_negatives,
    )
    queues = list(recipe.queue.by_name.values())
    of = Workload(
        shape=shape,
        texts=texts,
        gpus=gpus,
        gpus_per_node=cluster.gpus_per_node,
        batch=recipe.data.batch,
        dim=model.head.sizes[-1] if model.head else shape.hidden,
        zero_stage=engine.zero_stage,
        offload=engine.offload != "none",
        adapter_rank=model.adapter.rank if model.adapter else None,
        element_bytes=4 if engine.precision == "fp32" else 2,
        queue_rows=sum(queue.rows for queue in queues),
        queue_bytes=max((4 if queue.dtype == "float32" else 2 for queue in queues), default=4),
        momentum=bool(queues) or recipe.momentum.export or _compares_momentum(recipe),
        checkpointed=model.gradient_checkpointing,
        budget_tokens=engine.budget_tokens,
        eager=model.attention == "eager",
    )
    chosen = {"auto": 4 * of.trained > engine.gradient_bytes, "once": False, "per_chunk": True}
    per_chunk = engine.zero_stage >= 2 and chosen[engine.reduction]
    return replace(of, cached=_cached(recipe, of, longest), per_chunk=per_chunk)


def _compares_momentum(recipe: Recipe) -> bool:
    return any(isinstance(term, ContrastiveSection) and term.needs_momentum for term in recipe.losses)


def _cached(recipe: Recipe, of: Workload, longest: int) -> bool:
    """As `trainers.step.choose_caching` decides it: by the graphs of all texts at their longest."""
    engine = recipe.engine
    if engine.caching != "auto":
        return engine.caching == "on"
    texts = of.local * (1 + of.texts.documents)
    return graph_bytes(of, texts * longest, longest) > engine.activation_bytes


def _assumptions(recipe: Recipe, cluster: Cluster) -> list[str]:
    told = [
        f"{cluster.gpu} at {cluster.utilisation:.0%} of its dense peak and {cluster.fabric} between nodes, as given in "
        "docs/scaling.md; no GPU was measured",
        f"{RESERVE:.0%} of the memory is left to the CUDA context, NCCL and fragments",
    ]
    if cluster.query_tokens is None or cluster.document_tokens is None:
        told.append(
            "every text as long as model.max_tokens: give --query-tokens and --document-tokens what `gyre data stats` "
            "says"
        )
    if any(queue.per for queue in recipe.queue.by_name.values()):
        told.append("one class in a queue `per` class: rows and memory grow with every class")
    if any(not isinstance(term, ContrastiveSection) for term in recipe.losses):
        told.append("the traffic and the tiles of one contrastive loss: further losses come on top")
    return told
