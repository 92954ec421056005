"""The planning model for the processes that `benchmarks.scaling` measures: its rates, and what it says of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.planning.hardware import Fabric, Gpu, Link
from cluster.planning.shapes import Shape
from cluster.planning.speed import Machine, encoding_flops, scoring_flops, seconds_per_step
from cluster.planning.workload import Texts, Workload


@dataclass(frozen=True)
class Setting:
    """W, B and K of the legend in data_services/schema.py; a decoder of `layers` layers of width `hidden`; every text
    `tokens` long. checkpointed: recompute each layer; adapter_rank: LoRA of it, None: every weight."""

    workers: int
    batch: int
    rows: int
    tokens: int = 32
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    intermediate: int = 384
    vocabulary: int = 2048
    zero_stage: int = 2
    precision: str = "fp32"
    budget_tokens: int = 1024
    cached: bool = True
    per_chunk: bool = False
    checkpointed: bool = False
    adapter_rank: int | None = None
    tile: int = 4096


@dataclass(frozen=True)
class Rates:
    """Of one process here: fixed_s of a step whatever its size, operations a second of the tower and of the exchange;
    of a collective between two alpha_s a step and bytes a second. cores: processes beyond them take turns."""

    fixed_s: float
    encoding: float
    scoring: float
    alpha_s: float
    bandwidth: float
    cores: int


def planned(setting: Setting) -> Workload:
    """What `scaling_runs` runs, as the planner sees it."""
    heads = setting.heads
    shape = Shape(
        setting.hidden,
        setting.layers,
        heads,
        heads,
        setting.hidden // heads,
        setting.intermediate,
        setting.vocabulary,
    )
    return Workload(
        shape=shape,
        texts=Texts(setting.tokens, setting.tokens),
        gpus=setting.workers,
        gpus_per_node=setting.workers,
        batch=setting.batch,
        dim=setting.hidden,
        zero_stage=setting.zero_stage,
        adapter_rank=setting.adapter_rank,
        element_bytes=4 if setting.precision == "fp32" else 2,
        queue_rows=setting.rows,
        momentum=setting.rows > 0,
        cached=setting.cached,
        per_chunk=setting.per_chunk,
        checkpointed=setting.checkpointed,
        budget_tokens=setting.budget_tokens,
        eager=True,
        fused_norms=True,
        tile=setting.tile,
    )


def workload(workers: int, batch: int, rows: int) -> Workload:
    return planned(Setting(workers=workers, batch=batch, rows=rows))


def solved(settings: Sequence[tuple[int, int]], seconds: Sequence[float], sent: dict[str, float], cores: int) -> Rates:
    """seconds = fixed + encoding operations / rate + scoring operations / rate, of three (batch, rows) of a process."""
    of = [workload(1, batch, rows) for batch, rows in settings]
    terms = np.array([[1.0, encoding_flops(one), scoring_flops(one)] for one in of])
    fixed, encoding, scoring = np.linalg.solve(terms, seconds)
    return Rates(float(fixed), 1 / float(encoding), 1 / float(scoring), sent["alpha_s"], sent["bandwidth"], cores)


def predicted_s(of: Workload, rates: Rates) -> float:
    """Of a step; what W processes compute and copy, `cores` do at a time."""
    link = Link(rates.alpha_s, rates.alpha_s, rates.bandwidth)
    fabric = Fabric("gloo on one machine", link, link, 0.0, 0.0)
    on = Machine(Gpu("a core", rates.encoding, 0.0), fabric, 1.0, rates.scoring / rates.encoding)
    turns = max(1.0, of.gpus / rates.cores)
    return turns * (rates.fixed_s + seconds_per_step(of, on).total)
