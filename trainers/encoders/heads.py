"""What lies between the backbone's token vectors and the vectors that the loss compares.

Shapes: n texts, L tokens, H the backbone's width, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from trainers.config import Activation
from trainers.encoders.late_interaction import kept_first
from trainers.encoders.latent_attention import LatentAttention
from trainers.encoders.pooling import pool
from trainers.encoders.spec import Dense, ModelSpec

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "none": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


class Head(nn.ModuleList):
    """Linear layers with their activations, vectors [..., inputs] -> [..., outputs] float32; none: the identity."""

    def __init__(self, layers: Sequence[Dense]) -> None:
        super().__init__(nn.Linear(layer.inputs, layer.outputs, layer.bias) for layer in layers)
        self._activations = [ACTIVATIONS[layer.activation]() for layer in layers]

    def forward(self, vectors: Tensor) -> Tensor:
        for linear, activation in zip(self, self._activations, strict=True):
            assert isinstance(linear, nn.Linear)
            vectors = activation(linear(vectors.to(linear.weight.dtype)))
        return vectors.float()


class Readout(nn.Module):
    """Latent attention where there is one, pooling, head and normalisation, by a model's spec."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        latent = spec.latent
        self.latent = LatentAttention(spec.hidden, latent.count, latent.heads) if latent else None
        self.head = Head(spec.head)

    def forward(self, hidden: Tensor, pooled: Tensor, training: bool) -> Tensor:
        """hidden [n, L, H], pooled [n, L] bool -> [n, D] float32; with pooling "tokens" [n, L, D], the vectors of the
        tokens that `pooled` names first and zeros behind them.

        training  whether a training-only head takes part
        """
        if self.latent is not None:
            hidden = self.latent(hidden)
        tokens = self.spec.pooling == "tokens"
        vectors = hidden if tokens else pool(hidden, pooled, self.spec.pooling)
        vectors = self.head(vectors) if training or self.spec.head_use == "kept" else vectors.float()
        if self.spec.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return kept_first(vectors, pooled) if tokens else vectors
