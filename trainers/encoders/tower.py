"""What every tower is: a backbone of transformers and a readout, from a chunk's inputs to vectors.

Shapes: n items, L tokens padded on the right, H the backbone's width, D dimensions (data_services/schema.py has the
whole legend).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainers.encoders.heads import Readout
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.spec import ModelSpec


class Tower(nn.Module):
    """A backbone and a readout: pooling, head and normalisation, in fp32 but for the head's weights.

    `forward` gives what the loss sees, `embed` what is evaluated and exported; see `TextEncoder` and `MediaTower`.

    packed  whether the backbone reads a chunk's texts end to end, without padding (`packed.prepare`)
    """

    def __init__(self, backbone: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.readout = Readout(spec)
        self.spec = spec
        self.packed = False

    def token_counts(self, inputs: TowerInputs) -> Tensor:
        """[n] int64, how many of an item's tokens are pooled: with pooling "tokens" the vectors that it has."""
        raise NotImplementedError

    def embed(self, inputs: TowerInputs) -> Tensor:
        """The model's vectors [n, D], or [n, L, D], of what `forward` takes."""
        raise NotImplementedError

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """What `TowerInputs.tower` may be."""
        return (None,)

    def of(self, tower: int | None) -> Tower:
        """The one of that number: itself."""
        return self

    @property
    def gives_tokens(self) -> bool:
        """Whether an item has a vector for each token, not one for all."""
        return self.spec.pooling == "tokens"

    @property
    def dim(self) -> int:
        """Of `embed`; that of `forward` is `training_dim`."""
        return self.spec.dim

    @property
    def training_dim(self) -> int:
        return self.spec.training_dim

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: float) -> float:
        """Floating-point operations of one token, forward and backward, in an item of `length` tokens.

        Two for each weight that multiplies it (all but the embedding tables), two more where a gradient goes on below
        it and two for its own, so six where all are trained; and, per layer, 12·L·A for the scores and the weighted
        sum of attention of width A; a causal mask is counted as if it were none (PaLM, Chowdhery et al. 2022,
        appendix B). Recomputation, as in gradient caching, isn't counted, nor is the readout, which mostly works once
        an item.
        """
        tables = {id(m.weight) for m in self.backbone.modules() if isinstance(m, nn.Embedding)}
        of_weights, goes_on = 0.0, False
        for parameter in self.backbone.parameters():  # from the bottom up
            goes_on = goes_on or parameter.requires_grad
            if id(parameter) not in tables:
                of_weights += (2 + 2 * goes_on + 2 * parameter.requires_grad) * parameter.numel()
        config = self.backbone.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * head
        return of_weights + 12.0 * config.num_hidden_layers * length * width


class MediaTower(Tower):
    """A tower of items that are no texts: what it reads of a chunk are the arrays."""

    def read(self, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A chunk's arrays (`TowerInputs`) -> (states [n, L, H], which of them are pooled [n, L] bool).

        Where the chunk has no items, and so the arrays no rows, those of any one item, a blank image say: every worker
        must run the weights.
        """
        raise NotImplementedError

    def forward(self, inputs: TowerInputs) -> Tensor:
        """What the loss sees, [n, D] float32; with pooling "tokens" [n, L, D], a vector a state."""
        return self.readout(*self.read(inputs.arrays), training=True)

    def embed(self, inputs: TowerInputs) -> Tensor:
        return self.readout(*self.read(inputs.arrays), training=False)

    def token_counts(self, inputs: TowerInputs) -> Tensor:
        return inputs.mask.sum(1)
