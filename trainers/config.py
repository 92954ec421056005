"""Typed configuration of the trainers' rooms: one section per room, every default stated once, here.

Kept apart from the classes they configure only so that reading a recipe never imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from data_services.schema import Section
from trainers.objectives.sections.numbers import Number, Rate, ends_of
from trainers.tower_config import AdapterConfig, AudioConfig, FieldsConfig, ImageConfig, OwnConfig, Sizes, VisionConfig

PoolingMode = Literal["mean", "cls", "last", "max", "weighted_mean", "latent", "tokens"]
Activation = Literal["none", "tanh", "relu", "gelu", "silu"]


def _as_a_word(value: Any) -> Any:
    """YAML 1.1 reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_a_word)]


class FromConfig(Sizes):
    """A tower built from a config with random weights, and a BPE tokenizer trained on the training split."""

    architecture: str = Field("qwen3", description="a causal or masked model_type known to transformers")
    head_dim: int | None = Field(None, gt=0, multiple_of=2, description="None: hidden / heads")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of hidden units dropped in training")
    vocabulary: int = Field(8192, gt=300, description="tokens of the trained BPE, special ones included")
    lexical_init: bool = Field(
        False,
        description="layers begin as the identity and tokens can weigh more or less, so that the untrained model "
        "matches words; for small towers trained from scratch",
    )


class HeadConfig(Section):
    """`model.head:` a projection of the pooled vector: linear layers, each with an activation behind it."""

    sizes: list[int] = Field(min_length=1, description="outputs of each layer; the last is the width of the vector")
    activation: Activation = Field("relu", description="behind every layer but the last")
    last_activation: Activation = Field("none", description="behind the last layer (SimCSE's head: one layer, tanh)")
    bias: bool = Field(True, description="whether the layers have one")
    use: Literal["training", "kept"] = Field(
        "kept", description="training: only the loss sees it, the model that is evaluated and exported is without it"
    )

    @field_validator("sizes")
    @classmethod
    def _some_width(cls, sizes: list[int]) -> list[int]:
        if min(sizes) < 1:
            raise ValueError(f"a layer of {min(sizes)} outputs")
        return sizes


class LatentConfig(Section):
    """`model.latent:` the attention of `pooling: latent` (NV-Embed)."""

    count: int = Field(512, gt=0, description="learned vectors that every token attends to")
    heads: int = Field(8, gt=0, description="of the attention to the latents")


class ModelConfig(Section):
    """`model:` the text tower, and others beside it. Exactly one of `path` and `config`."""

    path: str | None = Field(
        None, description="folder, hub id or models:/NAME@ALIAS of a pretrained model or Sentence Transformers folder"
    )
    config: FromConfig | None = Field(None, description="build from random weights instead")
    encoder: str | None = Field(
        None,
        description="your own tower, package.module:function, called with (model section, model folder); "
        "returns a TextEncoder",
    )
    init_from: str | None = Field(
        None, description="folder or models:/NAME@ALIAS whose weights start this run; not a resume"
    )
    adapter: AdapterConfig | None = Field(None, description="train low-rank updates only; None: every weight")
    pooling: PoolingMode | None = Field(
        None,
        description="which token vectors make the text's: weighted_mean weighs by position, latent attends to learned "
        "vectors first, tokens keeps one vector a token (late interaction); "
        "None: what the Sentence Transformers folder says, else mean",
    )
    latent: LatentConfig | None = Field(None, description="sizes of `pooling: latent`; None: the defaults")
    mean_layers: int | None = Field(
        None,
        gt=0,
        description="token vectors are the mean of this many of the last layers'; "
        "None: what the Sentence Transformers folder says, else 1",
    )
    layers: list[int] = Field(
        [],
        description="training sees the vectors of these layers side by side (0: the token embeddings, -1: the last); "
        "the last of them must be the model's last, which alone is evaluated and exported",
    )
    head: HeadConfig | None = Field(None, description="None: that of the Sentence Transformers folder, if any")
    normalize: bool | None = Field(
        None,
        description="vectors of length one; None: true but for a Sentence Transformers folder that compares by dot "
        "product and doesn't normalise",
    )
    token_dim: int | None = Field(
        None,
        gt=0,
        description="with pooling tokens: width of their vectors, by a linear map; "
        "None: what the Sentence Transformers folder says, else the tower's width",
    )
    query_length: int | None = Field(
        None,
        gt=2,
        description="with pooling tokens: shorter queries are filled up to it with mask tokens, which count; "
        "None: what the Sentence Transformers folder says, else not",
    )
    skip_punctuation: bool | None = Field(
        None,
        description="with pooling tokens: punctuation of documents has no vector; "
        "None: what the Sentence Transformers folder says, else false",
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
    task_prompts: dict[str, dict[Literal["query", "document"], str]] = Field(
        {}, description="by task, prompts that stand in place of the two above in records of that task"
    )
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
    packing: Switch = Field(
        "auto", description="texts end to end in one row, not padded to one length; see trainers/encoders/packed.py"
    )
    towers: Literal["tied", "separate"] = Field(
        "tied", description="separate: queries and documents have encoders of their own, of one architecture"
    )
    document_path: str | None = Field(
        None, description="what the document tower starts from; None: the weights that the query tower starts from"
    )
    image: ImageConfig | None = Field(None, description="a tower for images; its vectors are as wide as the texts'")
    audio: AudioConfig | None = Field(None, description="a tower for sounds; its vectors are as wide as the texts'")
    own: dict[str, OwnConfig] = Field({}, description="by kind of item, towers of yours")
    fields: FieldsConfig | None = Field(None, description="items of several parts, each through the tower of its kind")
    vision: VisionConfig | None = Field(
        None, description="the model itself reads images among the tokens: Qwen2-VL, Qwen2.5-VL, Qwen3-VL"
    )
    freeze: list[str] = Field(
        [], description="patterns of weight names that training leaves alone, e.g. backbone.embed_tokens.*"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute each layer in the backward pass: less memory, about a third more time"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of `path` (a pretrained model) and `config` (random weights)")
        drawn = self.path is None and self.init_from is None
        if self.adapter is not None and drawn and not self.adapter.modules_to_save:
            raise ValueError(
                "an `adapter` leaves random weights as they are; give a `path`, or name what trains whole in "
                "adapter.modules_to_save, or remove it"
            )
        if self.adapter is not None and not self.adapter.merge and self.towers != "tied":
            raise ValueError("an `adapter` of each of two towers can't stand alone; leave `adapter.merge` true")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of items that there is a tower for."""
        if self.vision is not None:
            return ("text", "image", "parts")
        return ("text", *self.media, *(("parts",) if self.fields else ()))

    @property
    def media(self) -> tuple[str, ...]:
        """Kinds that have a tower beside the text tower, in the order of the towers."""
        built_in = {"image": self.image, "audio": self.audio}
        return (*(kind for kind, tower in built_in.items() if tower is not None), *self.own)

    @model_validator(mode="after")
    def _media_towers(self) -> ModelConfig:
        if not self.media and not self.fields:
            return self
        adapters = [self.adapter, self.image.adapter if self.image else None]
        alone = any(adapter is not None and not adapter.merge for adapter in adapters)
        taken = next((kind for kind in self.own if kind in ("text", "image", "audio", "parts")), None)
        of_training = self.head is not None and self.head.use == "training"
        for wrong, told in (
            (self.towers == "separate", "towers: an item's kind says its tower; leave it out"),
            (self.layers, "layers: the other towers have one vector; remove it"),
            (of_training, "head.use: the others have no such head; set it to kept"),
            (alone, "adapter.merge: an adapter of one of several towers can't stand alone; leave it true"),
            (self.packing == "on", "packing: it is for a text tower alone; set it to off"),
            (taken, f"own.{taken}: a kind that is taken; choose another name"),
            (self.fields and self.pooling == "tokens", "pooling: parts have one vector each; choose another"),
            (self.fields and self.pool_prompt is False, "pool_prompt: parts are pooled whole; leave it true"),
        ):
            if wrong:
                raise ValueError(f"beside a tower for {' and '.join(self.kinds[1:])}, {told}")
        return self

    @model_validator(mode="after")
    def _vision_part(self) -> ModelConfig:
        if self.vision is not None:
            for wrong, told in (
                (
                    self.media or self.fields,
                    "image, audio, own and fields: the model reads images itself; remove one of the two",
                ),
                ((self.vision.config is None) != (self.config is None), "vision.config and config go together"),
                (self.packing == "on", "packing: its positions are of images too; set it to off"),
                (self.token_dropout, "token_dropout: an image's places can't be hidden; set it to 0"),
                (self.query_length, "query_length: mask tokens are for texts; remove it"),
            ):
                if wrong:
                    raise ValueError(f"beside `vision`, {told}")
        return self

    @model_validator(mode="after")
    def _document_tower(self) -> ModelConfig:
        if self.document_path is not None and (self.towers == "tied" or self.path is None):
            raise ValueError("`document_path` needs `towers: separate` and a `path` for the query tower")
        return self


class OneQueue(Section):
    """What every queue has."""

    rows: int = Field(0, ge=0, description="K, over all workers; 0 turns the queue off")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the stored vectors")
    per: Literal["tasks", "languages", "modalities"] | None = Field(
        None, description="K rows of each of its classes, made as they appear; None: K rows of all together"
    )
    start: Literal["empty", "filled"] = Field(
        "empty", description="filled: rows are used once K have been enqueued (with `per`, of their class)"
    )
    max_age_steps: int | None = Field(
        None, gt=0, description="rows older than that are dropped; None: only K limits them"
    )


class NamedQueue(OneQueue):
    """`queue.others:` a queue beside that of the documents."""

    name: str = Field(
        pattern=r"^(queries|(documents|queries)/[a-z0-9_]+)$",
        description="`queries`, or whose encodings it keeps and a word of your own: documents/by_task",
    )
    rows: int = Field(gt=0, description="K, over all workers")


class QueueConfig(OneQueue):
    """`queue:` the cross-worker memory of momentum-encoded documents, and further ones by name."""

    others: list[NamedQueue] = Field([], description="further queues, of documents or of queries")
    observe_every_steps: int = Field(50, gt=0, description="steps between two looks at duplicates and separability")

    @model_validator(mode="after")
    def _names_differ(self) -> QueueConfig:
        names = [queue.name for queue in self.others]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two of `others` are named {twice!r}; rename one")
        return self

    @property
    def by_name(self) -> dict[str, OneQueue]:
        """Every queue that is on; the section's own is `documents`."""
        own: dict[str, OneQueue] = {"documents": self} if self.rows else {}
        return own | {queue.name: queue for queue in self.others}


class MomentumConfig(Section):
    """`momentum:` the averaged encoder, which fills the queue."""

    decay: Number = Field(
        0.99,
        description="m of: average <- m average + (1-m) weights, each step; a number, or a schedule: "
        "{start: 0.996, end: 1, shape: cosine}",
    )
    dropout: bool = Field(False, description="whether the averaged encoder drops what the trained one drops")
    export: bool = Field(False, description="export and evaluate the averaged weights instead of the last ones")

    @field_validator("decay")
    @classmethod
    def _moves(cls, decay: Number) -> Number:
        ends = ends_of(decay)
        if not (ends[0] < 1 and all(0 <= value <= 1 for value in ends)):
            told = " to ".join(f"{value:g}" for value in ends)
            raise ValueError(f"{told} must lie in [0, 1], and below 1 at first: else nothing moves")
        return decay


class OptimizerConfig(Section):
    """`optimizer:` AdamW with linear warm-up and a cosine to `min_lr_share`."""

    lr: Rate = Field(2e-3, description="after the warm-up, where the cosine begins; {pieces}: it changes on the way")
    embedding_lr: float | None = Field(
        None,
        gt=0,
        description="of token embedding tables, which a tower from random weights wants larger; None: lr. Where lr "
        "changes it does by as much",
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
    caching: Switch = Field("auto", description="gradient caching: encode twice instead of keeping every chunk's graph")
    activation_bytes: int = Field(
        2_000_000_000, gt=0, description="auto keeps graphs while their estimate is below this, on one worker"
    )
    reduction: Literal["auto", "once", "per_chunk"] = Field(
        "auto",
        description="when gradients are summed over the workers: once a step, from whole ones that every worker keeps, "
        "or with each chunk into the shards of ZeRO 2 and 3, for more traffic; auto: once where whole ones fit "
        "gradient_bytes",
    )
    gradient_bytes: int = Field(
        4_000_000_000, gt=0, description="auto keeps whole gradients up to this, 4 bytes a trained parameter"
    )
    deterministic: bool = Field(False, description="deterministic GPU kernels, so that a resume is bit-equal there")


class FaultsConfig(Section):
    """`faults:` what a run does about errors that end no process."""

    skip_in_a_row: int = Field(
        5,
        ge=0,
        description="steps whose loss or gradient isn't finite are skipped; more of them in a row end the run; "
        "0: the first one does",
    )
    skip_in_all: int = Field(100, ge=0, description="the same, over the whole run")
    spike: float | None = Field(
        8.0,
        gt=0,
        description="a loss so many deviations above the median of the last 50 is told and counted; None: none is",
    )
    compare_every_steps: int = Field(
        50,
        gt=0,
        description="steps between two comparisons of the workers: of the weights that all of them should hold alike, "
        "also before each checkpoint, and of their times",
    )
    slow_factor: float = Field(
        1.5, gt=1, description="a worker that takes so many times the median of the others is told"
    )
    timeout_s: float = Field(
        300,
        gt=0,
        description="workers that wait for each other for longer begin again from the last checkpoint, and the run's "
        "failure.log has the stack of every one",
    )


class CheckpointConfig(Section):
    """`checkpoint:` when to save and what to keep."""

    every_steps: int = Field(50, gt=0)
    asynchronous: bool = Field(
        True, description="write beside training, from a copy in host memory; false: training waits for the disk"
    )
    copy_to: str | None = Field(
        None,
        pattern=r"^(s3|gs)://[^/]+",
        description="s3:// or gs:// folder: each committed checkpoint is copied below it, with what a machine that has "
        "nothing else needs to go on; null: nothing is",
    )
    keep: int = Field(2, ge=1, description="newest committed checkpoints that stay")
    keep_best: int = Field(
        0, ge=0, description="checkpoints that stay for their scores beside training, by evaluation.best_by"
    )
    keep_every_hours: float | None = Field(
        None, gt=0, description="of the checkpoints of so many hours one stays for ever; null: none does"
    )
