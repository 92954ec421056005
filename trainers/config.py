"""Typed configuration of the trainers' rooms: one section per room, every default stated once, here.

Kept apart from the classes they configure only so that reading a recipe never imports torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_services.schema import Section


class FromConfig(Section):
    """A tower built from a config with random weights, and a BPE tokenizer trained on the training split."""

    architecture: str = Field("qwen3", description="a causal or masked model_type known to transformers")
    hidden: int = Field(256, gt=0, description="width of the residual stream")
    layers: int = Field(2, gt=0)
    heads: int = Field(4, gt=0)
    head_dim: int | None = Field(None, gt=0, multiple_of=2, description="None: hidden / heads")
    intermediate: int = Field(768, gt=0, description="width of the feed-forward layer")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of hidden units dropped in training")
    vocabulary: int = Field(8192, gt=300, description="tokens of the trained BPE, special ones included")
    lexical_init: bool = Field(
        False,
        description="layers begin as the identity and tokens can weigh more or less, so that the untrained model "
        "matches words; for small towers trained from scratch",
    )


class ModelConfig(Section):
    """`model:` the text tower. Exactly one of `path` and `config`."""

    path: str | None = Field(None, description="folder or hub id of a pretrained model or Sentence Transformers folder")
    config: FromConfig | None = Field(None, description="build from random weights instead")
    encoder: str | None = Field(
        None,
        description="your own tower, package.module:function, called with (model section, model folder); "
        "returns a TextEncoder",
    )
    init_from: str | None = Field(None, description="folder whose weights start this run; not a resume")
    pooling: Literal["mean", "cls", "last"] | None = Field(
        None, description="None: what the Sentence Transformers folder says, else mean"
    )
    bidirectional: bool | None = Field(
        None, description="drop a decoder's causal mask; None: as the Sentence Transformers folder has it, else true"
    )
    max_tokens: int | None = Field(
        None,
        gt=2,
        description="tokens kept of a text, prompt and special tokens included; "
        "None: what the Sentence Transformers folder says, else 192",
    )
    query_prompt: str | None = Field(None, description="None: what the Sentence Transformers folder says, else empty")
    document_prompt: str | None = None
    pool_prompt: bool | None = Field(
        None,
        description="whether the prompt's tokens take part in pooling; "
        "None: what the Sentence Transformers folder says, else true",
    )
    trust_remote_code: bool = False
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="auto: eager on a CPU (its bf16 backward is faster), sdpa on a GPU"
    )
    token_dropout: float = Field(0.0, ge=0, lt=1, description="share of input tokens hidden from attention in training")

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of `path` (a pretrained model) and `config` (random weights)")
        return self


class ObjectiveConfig(Section):
    """`objective:` the contrastive loss."""

    path: str | None = Field(
        None, description="your own loss, package.module:Name, made with (this section, group); None: InfoNCE"
    )
    temperature: float = Field(0.05, gt=0, description="divides the cosine similarity")
    directions: Literal["both", "query_to_document"] = "both"
    mask_same_document: bool = Field(True, description="a candidate equal to the query's positive is no negative")
    mask_same_query: bool = Field(True, description="a document of an equal query is no negative")
    tile: int = Field(4096, gt=0, description="candidates scored at once; changes memory, not the result")


class QueueConfig(Section):
    """`queue:` the cross-worker memory of momentum-encoded documents."""

    rows: int = Field(0, ge=0, description="K, over all workers; 0 turns the queue off")
    dtype: Literal["float32", "bfloat16"] = "float32"


class MomentumConfig(Section):
    """`momentum:` the averaged encoder that fills the queue."""

    decay: float = Field(0.99, ge=0, lt=1, description="m of: average <- m average + (1-m) weights, each step")
    export: bool = Field(False, description="export and evaluate the averaged weights instead of the last ones")


class OptimizerConfig(Section):
    """`optimizer:` AdamW with linear warm-up and a cosine to `min_lr_share`."""

    lr: float = Field(2e-3, gt=0)
    embedding_lr: float | None = Field(
        None, gt=0, description="of token embedding tables, which a tower from random weights wants larger; None: lr"
    )
    weight_decay: float = Field(0.01, ge=0, description="on matrices only: not on norms, biases or embeddings")
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(0, ge=0)
    min_lr_share: float = Field(0.0, ge=0, le=1, description="the cosine ends at this share of lr")
    clip_norm: float = Field(1.0, ge=0, description="0 turns clipping off")


class EngineConfig(Section):
    """`engine:` how weights are sharded and chunks computed."""

    zero_stage: int = Field(2, ge=0, le=3)
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="type the model computes in; the optimizer's weights are fp32 either way. auto: bf16 where every "
        "worker's hardware multiplies it (a GPU, a CPU with AMX or AVX-512 BF16), else fp32; a resume keeps the choice",
    )
    offload: Literal["none", "cpu"] = Field("none", description="where ZeRO keeps optimizer state")
    budget_tokens: int = Field(8192, gt=0, description="padded tokens of one chunk, on one worker")
    caching: Literal["auto", "on", "off"] = Field(
        "auto", description="gradient caching: encode twice instead of keeping every chunk's graph"
    )
    activation_bytes: int = Field(
        2_000_000_000, gt=0, description="auto keeps graphs while their estimate is below this, on one worker"
    )
    deterministic: bool = Field(False, description="deterministic GPU kernels, so that a resume is bit-equal there")


class CheckpointConfig(Section):
    """`checkpoint:` when to save and what to keep."""

    every_steps: int = Field(50, gt=0)
    keep: int = Field(2, ge=1, description="newest committed checkpoints that stay")
