"""Seconds of a step: arithmetic at a share of the peak, and collectives by alpha and beta over two levels of links.

A collective of S bytes over W workers, n nodes of g, with alpha a step's latency and beta a worker's bandwidth; of a
ring as NCCL estimates it (hardware.py), g rings at once so that a node's g ports all carry (Thakur, Rabenseifner &
Gropp 2005 for the algorithms and their costs):

    all_gather, reduce_scatter  base + (W - n) alpha_in + (n - 1) alpha_out + S (W-1)/W / min(beta_in, g beta_out)
    all_reduce                  twice that, or a tree where it is shorter:
                                base + 2 ((g-1) alpha_in + log2(n) alpha_out) + 2 S / min(beta_in, g beta_out)

In two levels, the g workers of a node with one number each talk to their like in other nodes, then to
each other: the ring over nodes has n - 1 steps of S/g, that inside g - 1 of S.

    all_gather, reduce_scatter  2 base + (n-1) alpha_out + S/g (n-1)/n / beta_out + (g-1) alpha_in + S (g-1)/g / beta_in

What the model leaves out: congestion and other jobs on the fabric, workers that wait for the one with most tokens, the
feed, checkpoints, kernels' own ups and downs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.planning.hardware import HOST_BANDWIDTH, SCORING_UTILISATION, UTILISATION, Fabric, Gpu
from cluster.planning.traffic import Collective, Part, collectives
from cluster.planning.workload import FP32, Workload


@dataclass(frozen=True)
class Machine:
    """What a step runs on.

    utilisation, scoring  shares of the peak that the transformer and the exchange's products reach
    two_levels            parts of the traffic whose gathers and reduce-scatters go in two levels; today none does
    overlap               whether gradients are reduced while the last chunk is still walked back; today they aren't
    scattered             whether ZeRO-1 and 2 reduce-scatter gradients; today DeepSpeed all-reduces them
    """

    gpu: Gpu
    fabric: Fabric
    utilisation: float = UTILISATION
    scoring: float = SCORING_UTILISATION
    two_levels: frozenset[Part] = frozenset()
    overlap: bool = False
    scattered: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; `communication` by part. hidden: of it, what goes on beside arithmetic; offload: masters and
    moments that stay in the node's memory."""

    encoding: float
    scoring: float
    communication: dict[str, float]
    hidden: float = 0.0
    offload: float = 0.0

    @property
    def exposed(self) -> float:
        return sum(self.communication.values()) - self.hidden

    @property
    def total(self) -> float:
        return self.encoding + self.scoring + self.exposed + self.offload

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"exposed": self.exposed, "total": self.total}


def seconds_per_step(of: Workload, on: Machine) -> StepTime:
    encoding, scoring = encoding_flops(of), scoring_flops(of)
    spent: dict[str, float] = {}
    for one in collectives(of):
        took = collective_seconds(one, of.gpus, of.gpus_per_node, on)
        spent[one.part] = spent.get(one.part, 0.0) + took
    encoding_s = encoding / (on.gpu.peak_flops * on.utilisation)
    hidden = min(spent.get("gradients", 0.0), _backward_share(of) * encoding_s) if on.overlap else 0.0
    scoring_s = scoring / (on.gpu.peak_flops * on.scoring)
    return StepTime(encoding_s, scoring_s, spent, hidden, _offload_seconds(of))


def _offload_seconds(of: Workload) -> float:
    """Gradients to the host and weights back, 4 and c bytes of each element of the share; AdamW reads 16 bytes of
    each there and writes 12, at the same rate."""
    return (FP32 + of.element_bytes + 28) * of.trained / of.gpus / HOST_BANDWIDTH if of.offload else 0.0


def encoding_flops(of: Workload) -> float:
    """Of one worker: forward 1, backward 2 (1 where the weights are frozen), again 1 of gradient caching, again 1 of a
    checkpointed layer, and the documents once more by the momentum encoder."""
    of_texts = of.local_tokens * of.shape.forward_flops(of.texts.length)
    backward = 2.0 if of.adapter_rank is None else 1.0
    passes = 1 + backward + of.cached + of.checkpointed
    documents = of.local * of.texts.documents * of.texts.document_tokens
    return passes * of_texts + of.momentum * documents * of.shape.forward_flops(of.texts.document_tokens)


def _backward_share(of: Workload) -> float:
    """Of the encoding's time, the last chunk's walk back: where a reduction of whole gradients can hide."""
    backward = 2.0 if of.adapter_rank is None else 1.0
    return backward / (1 + backward + of.cached + of.checkpointed) / of.chunks


def scoring_flops(of: Workload) -> float:
    """Of one worker, B queries against its candidates: two products of a queue's rows (logits, and their weighted sum),
    four of fresh documents (logits, again, and a gradient on either side); two operations each."""
    documents = of.local * of.texts.documents
    return 2.0 * of.batch * of.dim * (2 * of.queue_rows / of.gpus + 4 * documents)


def collective_seconds(one: Collective, gpus: int, gpus_per_node: int, on: Machine) -> float:
    g = min(gpus, gpus_per_node)
    nodes, fabric = gpus / g, on.fabric
    scattered = on.scattered and one.part == "gradients" and one.size > FP32
    if one.kind == "all_reduce" and not scattered:
        halves = replace(one, kind="all_gather", times=1)
        ring = 2 * _ring(halves.size, g, nodes, fabric) - fabric.ring_base_s
        return one.times * min(ring, _tree(one.size, g, nodes, fabric))
    in_two = one.part in on.two_levels and nodes > 1 and g > 1
    return one.times * (_two_levels if in_two else _ring)(one.size, g, nodes, fabric)


def _ring(size: float, g: int, nodes: float, fabric: Fabric) -> float:
    gpus = g * nodes
    latency = (gpus - nodes) * fabric.inside.ring_s + (nodes - 1) * fabric.between.ring_s
    return fabric.ring_base_s + latency + size * (gpus - 1) / gpus / _bus(g, nodes, fabric)


def _tree(size: float, g: int, nodes: float, fabric: Fabric) -> float:
    latency = 2 * ((g - 1) * fabric.inside.tree_s + math.log2(nodes) * fabric.between.tree_s)
    return fabric.tree_base_s + latency + 2 * size / _bus(g, nodes, fabric)


def _two_levels(size: float, g: int, nodes: float, fabric: Fabric) -> float:
    between = (nodes - 1) * fabric.between.ring_s + size / g * (nodes - 1) / nodes / fabric.between.bandwidth
    inside = (g - 1) * fabric.inside.ring_s + size * (g - 1) / g / fabric.inside.bandwidth
    return 2 * fabric.ring_base_s + between + inside


def _bus(g: int, nodes: float, fabric: Fabric) -> float:
    """Bytes a second that pass every worker of a ring: between nodes all ports of a node carry."""
    return fabric.inside.bandwidth if nodes == 1 else min(fabric.inside.bandwidth, g * fabric.between.bandwidth)
