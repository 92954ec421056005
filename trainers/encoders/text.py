"""The text tower: any transformers decoder or encoder, pooled to vectors.

Shapes: n texts, L tokens padded on the right, H the backbone's width, D dimensions (data_services/schema.py has the
whole legend).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data_services.schema import Ragged, UsageError
from trainers.config import ModelConfig
from trainers.encoders import packed
from trainers.encoders.adapters import adapt
from trainers.encoders.backbone import checkpoint_gradients, load_backbone
from trainers.encoders.cpu_kernels import Dropout, fuse_norms
from trainers.encoders.freezing import freeze
from trainers.encoders.heads import Readout
from trainers.encoders.late_interaction import fill_queries, without_skipped
from trainers.encoders.model_folder import read_readout
from trainers.encoders.pooling import hide_tokens, pooled_tokens
from trainers.encoders.spec import ModelSpec


class TextEncoder(nn.Module):
    """A backbone and a readout: pooling, head and normalisation, in fp32 but for the head's weights.

    `forward` gives what the loss sees, `embed` what is evaluated and exported. They differ where the spec has a
    training-only head or several layers.

    token_dropout  share of tokens hidden from attention and pooling, in training only
    dropout        share of hidden units dropped after the embedding and after each layer's attention and
                   feed-forward block, in training only: for backbones that have no such dropout themselves
    packed         whether the backbone reads a chunk's texts end to end, without padding (`packed.prepare`)
    """

    skipped: Tensor | None  # ids of the tokens that have no vector in a document

    def __init__(
        self, backbone: PreTrainedModel, spec: ModelSpec, token_dropout: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.readout = Readout(spec)
        self.spec = spec
        self.token_dropout = token_dropout
        self.packed = False
        self.dropout = Dropout(dropout)
        skipped = torch.tensor(list(spec.skipped.values())) if spec.skipped else None
        self.register_buffer("skipped", skipped, persistent=False)
        if dropout:
            self._drop_block_outputs()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_tokens: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """What the loss sees, [n, training_dim] float32; of several layers the vectors side by side, each of length
        one (unless the spec says otherwise). With pooling "tokens" [n, L, D], each text's `token_counts` first and
        zeros behind them.

        input_ids, attention_mask  [n, L] int64
        prompt_tokens              [n] int64, leading tokens that are the prompt; needed where the spec leaves the
                                   prompt out of pooling
        queries                    [n] bool, which texts are queries; needed where `spec.needs_queries`

        A text that pools no token is the zero vector, as in Sentence Transformers.
        """
        ids, mask, pooled = self._inputs(input_ids, attention_mask, prompt_tokens, queries)
        if self.training and self.token_dropout:
            mask, pooled = hide_tokens(mask, pooled, self.token_dropout, self.spec.pooling)
        hidden = self._hidden(ids, mask, self.spec.layers)
        return torch.cat([self.readout(layer, pooled, training=True) for layer in hidden], dim=-1)

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_tokens: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """The model's vectors [n, D], or [n, L, D], of what `forward` takes."""
        ids, mask, pooled = self._inputs(input_ids, attention_mask, prompt_tokens, queries)
        (hidden,) = self._hidden(ids, mask, ())
        return self.readout(hidden, pooled, training=False)

    def token_counts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_tokens: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> Tensor:
        """[n] int64, how many of a text's tokens are pooled: with pooling "tokens" the vectors that it has."""
        return self._inputs(input_ids, attention_mask, prompt_tokens, queries)[2].sum(1)

    def _inputs(
        self, ids: Tensor, mask: Tensor, prompt_tokens: Tensor | None, queries: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, mask, pooled) [n, L]: the tokens that the backbone reads and those that are pooled."""
        spec = self.spec
        if spec.pool_prompt:
            prompt_tokens = None
        elif prompt_tokens is None and any(spec.prompts.values()):
            raise ValueError("prompt_tokens [n] is needed: this model leaves its prompts out of pooling")
        if not spec.needs_queries:
            return ids, mask, pooled_tokens(mask, spec.pooling, prompt_tokens)
        if queries is None:
            raise ValueError("queries [n] is needed: this model encodes queries otherwise than documents")
        if spec.query_length is not None:
            assert spec.mask_id is not None, "prepare_model_folder gives the two together"
            ids, mask = fill_queries(ids, mask, queries, spec.query_length, spec.mask_id)
        pooled = pooled_tokens(mask, spec.pooling, prompt_tokens)
        return ids, mask, pooled if self.skipped is None else without_skipped(pooled, ids, queries, self.skipped)

    def _hidden(self, ids: Tensor, mask: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Token vectors [n, L, H] of each of `layers`, or of the mean of the last ones where there are none."""
        several = self.spec.mean_layers
        if not layers and several == 1:
            return [packed.run(self.backbone, ids, mask, self.packed).last_hidden_state]
        states = packed.run(self.backbone, ids, mask, self.packed, output_hidden_states=True).hidden_states
        return [states[i] for i in layers] or [torch.stack(states[-several:]).mean(0)]

    def token_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[n, L, H] of the last layer, for losses on token states; input_ids, attention_mask [n, L] int64."""
        (states,) = self._hidden(input_ids, attention_mask, ())
        return states

    @property
    def gives_tokens(self) -> bool:
        """Whether a text has a vector for each token, not one for all."""
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

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of one token, forward and backward, in a text of `length` tokens.

        Two for each weight that multiplies it (all but the embedding tables), two more where a gradient goes on below
        it and two for its own, so six where all are trained; and, per layer, 12·L·A for the scores and the weighted
        sum of attention of width A; a causal mask is counted as if it were none (PaLM, Chowdhery et al. 2022,
        appendix B). Recomputation, as in gradient caching, isn't counted, nor is the readout, which mostly works once
        a text.
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
    encoder = TextEncoder(backbone, spec, config.token_dropout, spec.added_dropout)
    encoder.packed = packing
    encoder.readout.load_state_dict(read_readout(folder), strict=False)
    freeze(encoder, config.freeze)
    return encoder


class TokenizePrompted(Protocol):
    """`Tokenize`, and how many leading tokens of a field's texts are its prompt."""

    def __call__(self, texts: Sequence[str], field: str) -> Ragged: ...

    def prompt_tokens(self, field: str) -> int: ...


class LocalEncoder:
    """`Encoder` on its model's device: batches of similar length, `batch_tokens` padded tokens each.

    batch_tokens  None: 16,384, and 1,024 on a CPU, where a layer's activations should stay in the cache

    A field is "query" or "document", or one of a task that has its own prompt ("sts-query").
    """

    def __init__(self, encoder: TextEncoder, tokenize: TokenizePrompted, batch_tokens: int | None = None) -> None:
        on_cpu = next(encoder.parameters()).device.type == "cpu"
        self.encoder, self.tokenize = encoder, tokenize
        self.batch_tokens = batch_tokens or (1024 if on_cpu else 16384)
        self.gives_tokens, self.unit_vectors = encoder.gives_tokens, encoder.spec.normalize

    def encode(self, texts: Sequence[str], field: str) -> np.ndarray:
        """Vectors [n, D] float32 of texts of one field, in their order; of length one unless the model says not."""
        if self.encoder.spec.pooling == "tokens":
            raise ValueError("this model has a vector for each token of a text; call encode_tokens")
        vectors = np.zeros((len(texts), self.encoder.dim), np.float32)
        for rows, embedded, _ in self._embedded(texts, field):
            vectors[rows] = embedded
        return vectors

    def encode_tokens(self, texts: Sequence[str], field: str) -> list[np.ndarray]:
        """The token vectors [m, D] float32 of each text, of a model with pooling "tokens"."""
        if self.encoder.spec.pooling != "tokens":
            raise ValueError("this model has one vector a text; call encode")
        vectors: list[np.ndarray] = [np.zeros((0, self.encoder.dim), np.float32)] * len(texts)
        for rows, embedded, counts in self._embedded(texts, field):
            for row, tokens, count in zip(rows, embedded, counts, strict=True):
                vectors[row] = tokens[:count]
        return vectors

    def _embedded(self, texts: Sequence[str], field: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each batch the rows of its texts [n], what `embed` gives, and the numbers of pooled tokens [n]."""
        tokens, prompt = self.tokenize(texts, field), self.tokenize.prompt_tokens(field)
        device = next(self.encoder.parameters()).device
        training, batches = self.encoder.training, []
        self.encoder.eval()
        try:
            with torch.inference_mode():
                for batch in self._batches(tokens.lengths):
                    ids, mask = (torch.from_numpy(x).to(device) for x in tokens.take(batch).padded())
                    inputs = {
                        "input_ids": ids,
                        "attention_mask": mask,
                        "prompt_tokens": torch.full((len(batch),), prompt, device=device),
                        "queries": torch.full((len(batch),), field.endswith("query"), device=device),
                    }
                    counts = self.encoder.token_counts(**inputs)
                    batches.append((batch, self.encoder.embed(**inputs).cpu().numpy(), counts.cpu().numpy()))
        finally:
            self.encoder.train(training)
        return batches

    def _batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            count = max(1, self.batch_tokens // max(1, int(lengths[order[start]])))
            yield order[start : start + count]
            start += count
