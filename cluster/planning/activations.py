"""Bytes that autograd keeps of a transformer's forward pass, by what each operation saves for its backward.

Of one token, in the type computed in (c bytes an element) unless it says fp32; H, A, V, I as in `shapes`:

    norm of w elements     fp32 input w and c-typed result w (transformers' own; in fp32 both are of that type), or the
                           result alone where norms are fused
    queries, keys, values  the normed input H once, and a norm each of A and V where heads are normalised
    attention              queries A, keys V, values V, the result A, and per head an fp32 log-sum-exp (flash kernels)
                           or L probabilities (eager: and a scaled copy of the queries, keys and values of each head)
    feed-forward           the normed input H, and I four times: gate, its activation, up, their product; without a
                           gate twice

Checkpointed (Chen et al. 2016, arXiv:1604.06174): each layer keeps its input H, and one layer at a time is computed
again. Cf. Korthikanti et al. 2022 (arXiv:2205.05198), section 4, who count the same for a GPT layer.
"""

from __future__ import annotations

from cluster.planning.workload import FP32, Workload

ROTATIONS = 2  # cos and sin of every place, shared by all layers


def layer_bytes(of: Workload, length: float) -> float:
    """Kept of one token by one layer, in a text of `length` tokens."""
    shape, c = of.shape, of.element_bytes
    norms = 2 * _norm(of, shape.hidden, 1)
    if shape.norms_heads:
        norms += _norm(of, shape.query_width, shape.heads) + _norm(of, shape.key_width, shape.key_heads)
    inputs = 2 * c * shape.hidden
    wide = c * shape.intermediate * (4 if shape.gated else 2)
    return norms + inputs + _attention(of, length) + wide + _adapter(of)


def _norm(of: Workload, width: int, groups: int) -> float:
    scale = groups * (of.element_bytes if of.fused_norms else FP32)
    return scale + width * (of.element_bytes if of.fused_norms else FP32 + of.element_bytes)


def _attention(of: Workload, length: float) -> float:
    shape, c = of.shape, of.element_bytes
    if of.eager:  # keys and values are repeated for the heads that share them
        return c * (4 * shape.query_width + shape.heads * length)
    return c * 2 * (shape.query_width + shape.key_width) + FP32 * shape.heads


def _adapter(of: Workload) -> float:
    """What A gives of each matrix."""
    return 0.0 if of.adapter_rank is None else of.element_bytes * of.adapter_rank * len(of.shape.matrices)


def graph_bytes(of: Workload, tokens: float, length: float) -> float:
    """Kept of `tokens` tokens, in texts of `length` tokens, from the token table to the pooled vectors."""
    shape, c = of.shape, of.element_bytes
    layer = layer_bytes(of, length) * tokens
    layers = shape.layers * c * shape.hidden * tokens + layer if of.checkpointed else shape.layers * layer
    last = _norm(of, shape.hidden, 1) * tokens
    return layers + last + _pooling(of, tokens) + ROTATIONS * c * shape.head_dim * length


def _pooling(of: Workload, tokens: float) -> float:
    """Pooled in fp32: a copy of the token vectors where they are of another type."""
    return 0.0 if of.element_bytes == FP32 else FP32 * of.shape.hidden * tokens


def activation_bytes(of: Workload) -> float:
    """What one worker keeps at a time: of a chunk under the token budget, or of its whole share of the batch where
    every chunk's graph is kept until the loss is known."""
    tokens = min(of.budget_tokens, of.local_tokens) if of.cached else of.local_tokens
    return graph_bytes(of, tokens, of.texts.length)


def backward_bytes(of: Workload, tokens: float) -> float:
    """What is alive at once while a layer is walked back: three tensors of I and two of H, in fp32. Found by measuring
    on a CPU, where it is within a tenth of the peak."""
    return FP32 * tokens * (3 * of.shape.intermediate + 2 * of.shape.hidden)
