"""The text tower: any transformers decoder or encoder, pooled to unit vectors.

Shapes: n texts, L tokens padded on the right, D dimensions (data_services/schema.py has the whole legend).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from data_services.schema import Ragged, UsageError
from trainers.config import ModelConfig
from trainers.encoders.backbone import load_backbone
from trainers.encoders.cpu_kernels import Dropout, fuse_norms
from trainers.encoders.model_folder import ModelSpec
from trainers.encoders.pooling import hide_tokens, pool, pooled_tokens


class TextEncoder(nn.Module):
    """A backbone, pooling and normalisation in fp32.

    token_dropout  share of tokens hidden from attention and pooling, in training only
    dropout        share of hidden units dropped after the embedding and after each layer's attention and
                   feed-forward block, in training only: for backbones that have no such dropout themselves
    """

    def __init__(
        self, backbone: PreTrainedModel, spec: ModelSpec, token_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        self.token_dropout = token_dropout
        self.dropout = Dropout(dropout)
        if dropout:
            self._drop_block_outputs()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, prompt_tokens: Tensor | None = None) -> Tensor:
        """input_ids, attention_mask [n, L] int64; prompt_tokens [n] int64, leading tokens that are the prompt
        (needed where the spec leaves the prompt out of pooling) -> unit vectors [n, D] float32.

        A text that pools no token is the zero vector, as in Sentence Transformers.
        """
        if self.spec.pool_prompt:
            prompt_tokens = None
        elif prompt_tokens is None and any(self.spec.prompts.values()):
            raise ValueError("prompt_tokens [n] is needed: this model leaves its prompts out of pooling")
        pooled = pooled_tokens(attention_mask, self.spec.pooling, prompt_tokens)
        if self.training and self.token_dropout:
            attention_mask, pooled = hide_tokens(attention_mask, pooled, self.token_dropout, self.spec.pooling)
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(pool(hidden, pooled), dim=-1)

    @property
    def dim(self) -> int:
        return self.spec.dim

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token, forward and backward, in a text of `length` tokens.

        Six for each weight that multiplies it (all but the embedding tables) and, per layer, 12·L·A for the
        scores and the weighted sum of attention of width A; a causal mask is counted as if it were none
        (PaLM, Chowdhery et al. 2022, appendix B). Recomputation, as in gradient caching, isn't counted.
        """
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        weights = sum(p.numel() for p in self.parameters() if id(p) not in tables)
        config = self.backbone.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * head
        return 6.0 * weights + 12.0 * config.num_hidden_layers * length * width

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
    return TextEncoder(backbone, spec, config.token_dropout, spec.added_dropout)


class TokenizePrompted(Protocol):
    """`Tokenize`, and how many leading tokens of a field's texts are its prompt."""

    def __call__(self, texts: Sequence[str], field: str) -> Ragged: ...

    def prompt_tokens(self, field: str) -> int: ...


class LocalEncoder:
    """`Encoder` on this process's device: batches of similar length, `batch_tokens` padded tokens each."""

    def __init__(self, encoder: TextEncoder, tokenize: TokenizePrompted, batch_tokens: int = 16384) -> None:
        self.encoder, self.tokenize, self.batch_tokens = encoder, tokenize, batch_tokens

    def encode(self, texts: Sequence[str], field: str) -> np.ndarray:
        """Unit vectors [n, D] float32 of texts of one field ("query" or "document"), in their order."""
        tokens, prompt = self.tokenize(texts, field), self.tokenize.prompt_tokens(field)
        vectors = np.zeros((len(texts), self.encoder.dim), np.float32)
        device = next(self.encoder.parameters()).device
        training = self.encoder.training
        self.encoder.eval()
        try:
            with torch.inference_mode():
                for batch in self._batches(tokens.lengths):
                    ids, mask = (torch.from_numpy(x).to(device) for x in tokens.take(batch).padded())
                    prompts = torch.full((len(batch),), prompt, device=device)
                    vectors[batch] = self.encoder(ids, mask, prompts).cpu().numpy()
        finally:
            self.encoder.train(training)
        return vectors

    def _batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            count = max(1, self.batch_tokens // max(1, int(lengths[order[start]])))
            yield order[start : start + count]
            start += count
