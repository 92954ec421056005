"""The text tower: any transformers decoder or encoder, pooled to vectors.

Shapes: n texts, L tokens padded on the right, H the backbone's width, D dimensions (data_services/schema.py has the
whole legend).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data_services.schema import UsageError
from trainers.config import ModelConfig
from trainers.encoders import packed
from trainers.encoders.adapters import adapt
from trainers.encoders.backbone import checkpoint_gradients, load_backbone
from trainers.encoders.cpu_kernels import Dropout, fuse_norms
from trainers.encoders.freezing import freeze
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.late_interaction import fill_queries, without_skipped
from trainers.encoders.model_folder import read_readout
from trainers.encoders.pooling import hide_tokens, pooled_tokens
from trainers.encoders.spec import ModelSpec
from trainers.encoders.tower import Tower


class TextEncoder(Tower):
    """The tower of texts, see `Tower`. `forward` and `embed` differ where the spec has a training-only head or several
    layers.

    token_dropout  share of tokens hidden from attention and pooling, in training only
    dropout        share of hidden units dropped after the embedding and after each layer's attention and
                   feed-forward block, in training only: for backbones that have no such dropout themselves
    """

    skipped: Tensor | None  # ids of the tokens that have no vector in a document

    def __init__(
        self, backbone: PreTrainedModel, spec: ModelSpec, token_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__(backbone, spec)
        self.token_dropout = token_dropout
        self.dropout = Dropout(dropout)
        skipped = torch.tensor(list(spec.skipped.values())) if spec.skipped else None
        self.register_buffer("skipped", skipped, persistent=False)
        if dropout:
            self._drop_block_outputs()

    def forward(self, inputs: TowerInputs) -> Tensor:
        """What the loss sees, [n, training_dim] float32; of several layers the vectors side by side, each of length
        one (unless the spec says otherwise). With pooling "tokens" [n, L, D], each text's `token_counts` first and
        zeros behind them.

        A text that pools no token is the zero vector, as in Sentence Transformers.
        """
        ids, mask, pooled = self._tokens(inputs)
        if self.training and self.token_dropout:
            mask, pooled = hide_tokens(mask, pooled, self.token_dropout, self.spec.pooling)
        hidden = self._hidden(ids, mask, self.spec.layers, inputs.arrays)
        return torch.cat([self.readout(layer, pooled, training=True) for layer in hidden], dim=-1)

    def embed(self, inputs: TowerInputs) -> Tensor:
        """The model's vectors [n, D], or [n, L, D], of what `forward` takes."""
        ids, mask, pooled = self._tokens(inputs)
        (hidden,) = self._hidden(ids, mask, (), inputs.arrays)
        return self.readout(hidden, pooled, training=False)

    def token_counts(self, inputs: TowerInputs) -> Tensor:
        """[n] int64, how many of a text's tokens are pooled: with pooling "tokens" the vectors that it has."""
        return self._tokens(inputs)[2].sum(1)

    def _tokens(self, inputs: TowerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, mask, pooled) [n, L]: the tokens that the backbone reads and those that are pooled."""
        spec, ids, mask = self.spec, inputs.ids, inputs.mask
        prompt_tokens, queries = inputs.prompt_tokens, inputs.queries
        if spec.pool_prompt:
            prompt_tokens = None
        elif prompt_tokens is None and any(spec.prompts.values()):
            raise ValueError("prompt_tokens [n] is needed: this model leaves its prompts out of pooling")
        if spec.filler is not None:
            every = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
            ids, mask = fill_queries(ids, mask, every, spec.max_tokens, spec.filler)
        if spec.own_pooling:
            return ids, mask, torch.ones_like(mask[:, :1], dtype=torch.bool)
        if not spec.needs_queries:
            return ids, mask, pooled_tokens(mask, spec.pooling, prompt_tokens)
        if queries is None:
            raise ValueError("queries [n] is needed: this model encodes queries otherwise than documents")
        if spec.query_length is not None:
            assert spec.mask_id is not None, "prepare_model_folder gives the two together"
            ids, mask = fill_queries(ids, mask, queries, spec.query_length, spec.mask_id)
        pooled = pooled_tokens(mask, spec.pooling, prompt_tokens)
        return ids, mask, pooled if self.skipped is None else without_skipped(pooled, ids, queries, self.skipped)

    def _hidden(self, ids: Tensor, mask: Tensor, layers: Sequence[int], arrays: Mapping[str, Tensor]) -> list[Tensor]:
        """Token vectors [n, L, H] of each of `layers`, or of the mean of the last ones where there are none."""
        several, seen = self.spec.mean_layers, self._seen(ids, arrays)
        if self.spec.own_pooling:
            return [self.backbone(input_ids=ids, attention_mask=mask).pooler_output[:, None]]
        if not layers and several == 1:
            return [packed.run(self.backbone, ids, mask, self.packed, **seen).last_hidden_state]
        states = packed.run(self.backbone, ids, mask, self.packed, output_hidden_states=True, **seen).hidden_states
        return [states[i] for i in layers] or [torch.stack(states[-several:]).mean(0)]

    def _seen(self, ids: Tensor, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the backbone takes of a chunk besides tokens: of texts nothing."""
        return {}

    def token_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[n, L, H] of the last layer, for losses on token states; input_ids, attention_mask [n, L] int64."""
        if self.spec.own_pooling:
            raise UsageError(f"a loss on token states can't be had of {self.spec.architecture}, which pools by itself")
        (states,) = self._hidden(input_ids, attention_mask, (), {})
        return states

    def _drop_block_outputs(self) -> None:
        def drop(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return self.dropout(output[0]), *output[1:]
            return self.dropout(output)

        blocks = [self.backbone.get_input_embeddings()]
        for layer in getattr(self.backbone, "layers", []):
            blocks += [getattr(layer, name) for name in ("self_attn", "mlp") if hasattr(layer, name)]
        if len(blocks) == 1:
            raise UsageError(
                f"model.config.dropout: there is no place for it in {self.spec.architecture!r}, set it to 0"
            )
        for block in blocks:
            block.register_forward_hook(drop)


def build_encoder(config: ModelConfig, folder: Path) -> TextEncoder:
    """The encoder of a folder made by `prepare_model_folder`, in fp32, on the CPU.

    Weights come from the folder where it has some, else from the current torch generator.
    """
    spec = ModelSpec.load(folder)
    lexical = config.config is not None and config.config.lexical_init
    backbone = load_backbone(folder, config.attention, spec.trust_remote_code, lexical_init=lexical)
    if not torch.cuda.is_available():
        fuse_norms(backbone)
    packing = packed.prepare(backbone, config)
    if config.gradient_checkpointing:
        checkpoint_gradients(backbone)
    if config.adapter is not None:
        adapt(backbone, config.adapter, spec)
    encoder = text_encoder(backbone, spec, folder, config.token_dropout, spec.added_dropout)
    encoder.packed = packing
    encoder.readout.load_state_dict(read_readout(folder), strict=False)
    freeze(encoder, config.freeze)
    return encoder


def text_encoder(
    backbone: PreTrainedModel, spec: ModelSpec, folder: Path, token_dropout: float = 0.0, dropout: float = 0.0
) -> TextEncoder:
    """The encoder of what the folder's model reads: texts, or with a vision part images too."""
    from trainers.encoders.vision_language import READS, VisionLanguageEncoder

    if spec.reads == READS:
        return VisionLanguageEncoder(backbone, spec, folder, token_dropout, dropout)
    return TextEncoder(backbone, spec, token_dropout, dropout)
