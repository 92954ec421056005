"""The sides of benchmarks/kernel.py, each in a process of its own: one InfoNCE loss and its gradients on one GPU.

Queries [B, D] and candidates [n, D] are unit vectors in bfloat16, the first B candidates the queries' positives. In
the setting `fresh` all n candidates take gradients; in `queue` the first B do and K more are stored rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize, softplus

from benchmarks.common import child_main
from trainers.objectives import kernels
from trainers.objectives.kernel_pairs import Pairs

TEMPERATURE = 0.05
RING_BLOCKS = 8  # how many workers the ring would have

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _Ours(torch.autograd.Function):
    """row [B], the log-sum-exp over all candidates but the own positive, of fresh candidates and stored rows."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, fresh: Tensor, stored: Tensor | None) -> Tensor:
        ctx.pairs = Pairs(queries, fresh, TEMPERATURE, own=slice(0, len(queries)))
        parts = [kernels.forward_block(ctx.pairs)]
        if stored is not None:
            parts.append(kernels.forward_block(Pairs(queries, stored, TEMPERATURE), values=True))
        row = torch.stack([part.maximum + part.total.log() for part in parts]).logsumexp(0)
        ctx.row, ctx.queue = row, parts[1:]
        return row.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, fresh = ctx.pairs.queries, ctx.pairs.candidates
        if ctx.queue:
            (part,) = ctx.queue
            weight = upstream[0] * (part.maximum - ctx.row).exp() / TEMPERATURE
            gradient = part.values.mul_(weight[:, None])
        else:
            gradient = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
        of_fresh = kernels.backward_block(ctx.pairs, ctx.row, upstream[0], gradient)
        return gradient.to(queries.dtype), of_fresh.to(fresh.dtype), None


def ours(queries: Tensor, fresh: Tensor, stored: Tensor | None) -> Tensor:
    row = _Ours.apply(queries, fresh, stored)
    return softplus(row - _positives(queries, fresh)).mean()


def dense(queries: Tensor, fresh: Tensor, stored: Tensor | None) -> Tensor:
    """One product and a cross-entropy in float32, as autocast has it."""
    candidates = fresh if stored is None else torch.cat([fresh, stored])
    logits = (queries @ candidates.T).float() / TEMPERATURE
    return cross_entropy(logits, torch.arange(len(queries), device=queries.device))


class _Ring(torch.autograd.Function):
    """The log-sum-exp [B] over blocks of candidates that come by one after another.

    The mechanism of Inf-CLIP's ring (Cheng et al., arXiv:2410.17243; inf_cl/ring.py of DAMO-NLP-SG/Inf-CLIP): a block's
    logits are reduced to a log-sum-exp, which is merged into the running one by lse - logsigmoid(lse - block); the
    backward pass goes round again, recomputes each block's logits, and adds up gradients in float32. On one device
    nothing is sent. Better than released in two ways: products are of the rows' own type, not of float32, and blocks
    without gradient get none.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, fresh: Tensor, stored: Tensor | None) -> Tensor:
        row = None
        for block, _ in _blocks(fresh, stored):
            of_block = _block_logits(queries, block).logsumexp(1)
            row = of_block if row is None else row - logsigmoid(row - of_block)
        assert row is not None, "there is a candidate at least"
        ctx.save_for_backward(queries, fresh, stored, row)
        return row

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        queries, fresh, stored, row = ctx.saved_tensors
        of_queries = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
        of_fresh = []
        for block, takes_gradient in _blocks(fresh, stored):
            logits = _block_logits(queries, block)
            weights = logits.sub_(row[:, None]).exp_().mul_(upstream[0][:, None] / TEMPERATURE).to(block.dtype)
            of_queries += _product(weights, block)
            if takes_gradient:
                of_fresh.append(_product(weights.T, queries))
        return of_queries.to(queries.dtype), torch.cat(of_fresh).to(fresh.dtype), None


def _blocks(fresh: Tensor, stored: Tensor | None) -> list[tuple[Tensor, bool]]:
    blocks = [(block, True) for block in fresh.chunk(RING_BLOCKS)]
    return blocks if stored is None else blocks + [(block, False) for block in stored.chunk(RING_BLOCKS)]


def _block_logits(queries: Tensor, block: Tensor) -> Tensor:
    return _product(queries, block.T).div_(TEMPERATURE)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In float32, of bfloat16 operands."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


def ring(queries: Tensor, fresh: Tensor, stored: Tensor | None) -> Tensor:
    return (_Ring.apply(queries, fresh, stored) - _positives(queries, fresh)).mean()


def inf_cl(queries: Tensor, fresh: Tensor, stored: Tensor | None) -> Tensor:
    """Inf-CLIP's own fused kernels as released (`pip install inf_cl`): float32, every candidate takes a gradient."""
    from inf_cl import cal_inf_loss

    candidates = fresh if stored is None else torch.cat([fresh, stored])
    scale = torch.tensor(1 / TEMPERATURE, device=queries.device)
    return cal_inf_loss(queries, candidates, scale=scale)


def _positives(queries: Tensor, fresh: Tensor) -> Tensor:
    """[B] logits of each query's own candidate."""
    return (queries * fresh[: len(queries)]).sum(1, dtype=torch.float32) / TEMPERATURE


SIDES: dict[str, Loss] = {
    "ours": ours,
    "dense": dense,
    "compiled": torch.compile(dense, dynamic=False),
    "ring": ring,
    "inf_cl": inf_cl,
}


def card() -> dict[str, Any]:
    """The GPU, if there is one, and which optional peer is installed."""
    if not torch.cuda.is_available():
        return {"name": None}
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "memory_bytes": about.total_memory,
        "processors": about.multi_processor_count,
        "torch": torch.__version__,
        "inf_cl": find_spec("inf_cl") is not None,
    }


def peak(size: int, repeats: int) -> dict[str, float]:
    """Operations per second of one large bf16 product of random numbers."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return {"flops_per_s": 2 * size**3 / _median_s(lambda: torch.mm(left, right, out=out), repeats)}


def run(side: str, setting: str, batch: int, rows: int, dim: int, repeats: int) -> dict[str, Any]:
    """Seconds of one loss with its backward, the most memory it held beside its inputs, and what it found."""
    torch.manual_seed(0)

    def unit(n: int) -> Tensor:
        return normalize(torch.randn(n, dim, device="cuda"), dim=1)

    queries = unit(batch)
    fresh = unit(rows if setting == "fresh" else batch)
    fresh[:batch] = normalize(queries + unit(batch), dim=1)
    stored = unit(rows).bfloat16() if setting == "queue" else None
    queries, fresh = (x.bfloat16().requires_grad_() for x in (queries, fresh))
    held = torch.cuda.memory_allocated()

    def step() -> Tensor:
        queries.grad = fresh.grad = None
        loss = SIDES[side](queries, fresh, stored)
        loss.backward()
        return loss.detach()

    try:
        loss = step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = _median_s(step, repeats)
    except torch.OutOfMemoryError:
        return {"seconds": None}
    assert queries.grad is not None
    return {
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() - held,
        "loss": float(loss),
        "gradient_norm": float(queries.grad.float().norm()),
    }


def _median_s(step: Callable[[], Any], repeats: int) -> float:
    """Of single calls between events on the device, after two that warm up."""
    step(), step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)


if __name__ == "__main__":
    child_main({"card": card, "peak": peak, "run": run})
