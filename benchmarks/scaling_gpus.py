"""A step on 8 to 1,024 GPUs by the planning model: weak scaling of ours, and what two other ways would take there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.planning.choices import WHOLE_GRADIENT_BYTES, cheapest, choices
from cluster.planning.hardware import FABRICS, GPUS
from cluster.planning.memory import ROOM, exchange_bytes, queue_bytes
from cluster.planning.shapes import PRESETS
from cluster.planning.speed import Machine, collective_seconds, scoring_flops, seconds_per_step
from cluster.planning.traffic import Collective, exchange
from cluster.planning.workload import FP32, KEY_BYTES, Texts, Workload
from evaluation.charts import line_chart

GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
QUEUE_ROWS = 16 << 20
EACH = 64
"""b, queries of a GPU, of 64 tokens each; with one document of 256."""
TEXTS = Texts(64, 256)
MODELS = ("qwen3-embedding-0.6b", "qwen3-embedding-8b")
LIFTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "exchange in two levels": {"two_levels": frozenset({"exchange"})},
    "all gathers in two levels": {"two_levels": frozenset({"exchange", "weights", "average"})},
    "and gradients scattered and overlapped": {
        "two_levels": frozenset({"exchange", "weights", "average", "gradients"}),
        "scattered": True,
        "overlap": True,
    },
}
AS_IT_IS, *_, ALL_LIFTS = LIFTS
GOAL = 0.9


def machine(fabric: str = "ndr", gpu: str = "h100", **lifts: Any) -> Machine:
    return Machine(GPUS[gpu], FABRICS[fabric], **lifts)


def workload(model: str, gpus: int, each: int = EACH) -> Workload:
    """Full fine-tuning with queue and momentum encoder, rows in bf16."""
    shape = PRESETS[model]
    return Workload(
        shape=shape,
        texts=TEXTS,
        gpus=gpus,
        gpus_per_node=8,
        batch=each * gpus,
        dim=shape.hidden,
        queue_rows=QUEUE_ROWS,
        queue_bytes=2,
        momentum=True,
        checkpointed=True,
        budget_tokens=16_384,
    )


def fitting(of: Workload, on: Machine) -> Workload | None:
    """The cheapest ZeRO stage and offload of training every weight that fits; None where none does."""
    found = choices(of, on, on.gpu.memory_bytes, 256)
    best = cheapest([one for one in found if one.workload.adapter_rank is None])
    return best.workload if best else None


def efficiencies(model: str, on: Machine, each: int = EACH) -> dict[int, dict[str, Any]]:
    """By GPUs: what fits, its seconds, and its throughput a GPU over that at 8 GPUs."""
    found: dict[int, dict[str, Any]] = {}
    for gpus in GPU_COUNTS:
        of = fitting(workload(model, gpus, each), on)
        if of is None:
            continue
        time = seconds_per_step(of, on)
        base = next(iter(found.values()), None)
        found[gpus] = {
            "zero_stage": of.zero_stage,
            "offload": of.offload,
            "budget_tokens": of.budget_tokens,
            "seconds": time.as_dict(),
            "efficiency": base["seconds"]["total"] / time.total if base else 1.0,
        }
    return found


def model_tables() -> dict[str, Any]:
    """weak: by model and lift; fabrics and batches: what they change at 1,024; sides: negatives three ways."""
    weak = {m: {lift: efficiencies(m, machine(**keys)) for lift, keys in LIFTS.items()} for m in MODELS}
    at_most = GPU_COUNTS[-1]
    fabrics = {m: {f: efficiencies(m, machine(f))[at_most]["efficiency"] for f in FABRICS} for m in MODELS}
    batches = {
        m: {
            lift: {b: efficiencies(m, machine(**LIFTS[lift]), b)[at_most]["efficiency"] for b in (16, 32, 64, 128)}
            for lift in (AS_IT_IS, ALL_LIFTS)
        }
        for m in MODELS
    }
    stages = {m: {stage: at_one_stage(m, stage) for stage in range(4)} for m in MODELS}
    sides = {m: [side for gpus in GPU_COUNTS for side in three_ways(workload(m, gpus))] for m in MODELS}
    at_1024 = {"fabrics_at_1024": fabrics, "pairs_of_a_gpu_at_1024": batches, "stages_at_1024": stages}
    return {"weak": weak, **at_1024, "sides": sides}


def at_one_stage(model: str, stage: int) -> float:
    """Efficiency at 1,024 GPUs over 8 where both train at this ZeRO stage, whether it fits or not."""

    def seconds(gpus: int) -> float:
        of = replace(workload(model, gpus), zero_stage=stage)
        per_chunk = stage >= 2 and FP32 * of.trained > WHOLE_GRADIENT_BYTES
        return seconds_per_step(replace(of, per_chunk=per_chunk), machine()).total

    return seconds(GPU_COUNTS[0]) / seconds(GPU_COUNTS[-1])


def three_ways(of: Workload) -> Iterator[dict[str, Any]]:
    """What the negatives alone take of a GPU: bytes held and made, bytes sent, seconds.

    ours        K/W rows; the queries travel, their gradient comes back
    replicated  all K rows on every GPU, and a copy of them in the product (Contriever's, without its broadcast of
                buffers); the keys travel
    gathered    no queue: queries and documents of the batch on every GPU, with their gradients back, and b x B logits
                each way (open_clip's local loss with gradient)
    """
    k, b, d, w = of.queue_rows, of.batch, of.dim, of.gpus
    row = of.queue_bytes * d + KEY_BYTES * of.queue_keys
    vectors = Collective("exchange", "all_gather", FP32 * b * d)
    gathered = [vectors, vectors] + 2 * [replace(vectors, kind="reduce_scatter")]
    logits = 2 * FP32 * of.local * b
    ours = queue_bytes(of) + exchange_bytes(of)
    yield _side("ours", of, ours, exchange(of), scoring_flops(of), k + b)
    whole = ROOM * k * row + of.queue_bytes * k * d
    yield _side("replicated queue", of, whole, [vectors], scoring_flops(replace(of, batch=int(of.local), gpus=1)), k)
    products = 2 * 2.0 * of.local * b * d * 3
    yield _side("gathered candidates", of, 4 * FP32 * b * d + 2 * logits, gathered, products, b)
    assert w > 1


def _side(
    name: str, of: Workload, memory: float, sent: list[Collective], flops: float, negatives: float
) -> dict[str, Any]:
    on = machine()
    seconds = sum(collective_seconds(one, of.gpus, of.gpus_per_node, on) for one in sent)
    return {
        "side": name,
        "gpus": of.gpus,
        "negatives": int(negatives),
        "memory_bytes": memory,
        "fits": memory < on.gpu.memory_bytes,
        "wire_bytes": sum(one.wire_bytes(of.gpus) for one in sent),
        "communication_s": seconds,
        "arithmetic_s": flops / (on.gpu.peak_flops * on.scoring),
    }


def show_model(tables: dict[str, Any]) -> None:
    for model, lifts in tables["weak"].items():
        print(f"\n{model}, {EACH} pairs a GPU, K = {QUEUE_ROWS:,}, H100s and NDR: efficiency over 8 GPUs")
        for lift, found in lifts.items():
            cells = [f"{gpus}: {at['efficiency']:.3f} (ZeRO-{at['zero_stage']})" for gpus, at in found.items()]
            print(f"  {lift:40} " + "  ".join(cells))
        last = lifts[AS_IT_IS][GPU_COUNTS[-1]]["seconds"]
        spent = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in last["communication"].items())
        print(f"  at 1,024, ms: encoding {1e3 * last['encoding']:.1f}, scoring {1e3 * last['scoring']:.1f}, {spent}")
        print(f"  other fabrics at 1,024: {_shares(tables['fabrics_at_1024'][model])}")
        for lift, found_at in tables["pairs_of_a_gpu_at_1024"][model].items():
            print(f"  other pairs a GPU at 1,024, {lift}: {_shares(found_at)}")
        print(f"  one ZeRO stage at 8 and at 1,024: {_shares(tables['stages_at_1024'][model])}")
        for side in tables["sides"][model]:
            if side["gpus"] in (8, GPU_COUNTS[-1]):
                print(f"  {side['gpus']:5} {side['side']:20} {_side_line(side)}")


def _shares(found: dict[Any, float]) -> str:
    return ", ".join(f"{name} {share:.3f}" for name, share in found.items())


def _side_line(side: dict[str, Any]) -> str:
    fits = "" if side["fits"] else " (doesn't fit)"
    return (
        f"{side['negatives']:>12,} negatives, {side['memory_bytes'] / 1e9:.2f} GB{fits}, "
        f"{side['wire_bytes'] / 1e6:,.0f} MB sent in {1e3 * side['communication_s']:.1f} ms, "
        f"{1e3 * side['arithmetic_s']:.1f} ms of arithmetic"
    )


STYLE = """<style>
svg { font: 12px sans-serif; background: #fff;
  --s0: #2a6f97; --s1: #c8553d; --s2: #588157; --s3: #8d6a9f; --s4: #b08900; --s5: #4a4e69 }
.mark { fill: none; stroke-width: 2 } .axis { stroke: #333 } .grid { stroke: #ddd } text { fill: #333 }
</style>"""


def write_plot(file: Path, tables: dict[str, Any]) -> None:
    """Efficiency over GPUs: both models as they are and with every lift, and the goal."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for model, lifts in tables["weak"].items():
        size = model.rsplit("-", 1)[-1].upper()
        for lift, name in ((AS_IT_IS, "as it is"), (ALL_LIFTS, "with the lifts")):
            lines[f"{size}, {name}"] = [(gpus, at["efficiency"]) for gpus, at in lifts[lift].items()]
    lines["the goal"] = [(GPU_COUNTS[0], GOAL), (GPU_COUNTS[-1], GOAL)]
    figure = line_chart(lines, "GPUs", "throughput of a GPU over that at 8 GPUs", log_x=True)
    drawn = re.search(r"<svg.*</svg>", figure, re.DOTALL)
    assert drawn is not None, "a chart of lines is an svg"
    names = "".join(
        f'<text x="70" y="{170 + 16 * i}" style="fill: var(--s{i})">{name}</text>' for i, name in enumerate(lines)
    )
    plot = drawn.group().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    plot = plot.replace(">", f">{STYLE}", 1).replace("</svg>", f"{names}</svg>")
    file.write_text(plot + "\n")
