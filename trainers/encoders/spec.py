"""What a model folder says of its tower beyond transformers' own config."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from data_services.schema import UsageError
from trainers.config import Activation, PoolingMode

SPEC_FILE = "gyre_model.json"
TOWERS_FILE = "gyre_towers.json"  # beside it where the folder is of several towers, see `towers.Layout`


@dataclass(frozen=True)
class Dense:
    """One layer of a head: activation(W x + b), W [outputs, inputs]."""

    inputs: int
    outputs: int
    bias: bool = True
    activation: Activation = "none"


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention: `count` learned vectors, attended to with `heads` heads."""

    count: int
    heads: int


@dataclass(frozen=True)
class ModelSpec:
    """The whole of a tower's settings; `gyre_model.json` holds them.

    architecture       transformers' model_type
    pooling            which tokens make the vector
    bidirectional      whether a token attends to later ones
    max_tokens         kept of a text, prompt and special tokens included
    prompts            put before a text, by field ("query", "document") and by task and field ("sts-query")
    pool_prompt        whether the prompt's tokens take part in pooling
    dim                D of the vectors that are evaluated and exported
    added_dropout      share of hidden units that TextEncoder drops, the architecture having no such dropout
    trust_remote_code  whether loading it may run code from the folder
    normalize          whether vectors are brought to length one
    latent             of pooling "latent", else None
    mean_layers        token vectors are the mean of this many of the last layers'
    layers             whose vectors training sees side by side, 0 the token embeddings; () the last alone
    head               linear layers between pooling and normalisation; with pooling "tokens" on each token's vector
    head_use           "training": only the loss sees the head's output
    query_length       with pooling "tokens": mask tokens fill shorter queries up to it
    mask_id            the token that does; None where there is no query_length
    skipped            with pooling "tokens": by word, the tokens that have no vector in a document
    reads              kind of the items: "text", "image", …; "vision": texts, images and items of both
    code               of a user's own modality, its import path
    template           of "vision", order of the parts of an item; None: as the source names them
    own_pooling        the backbone's own pooled vector stands in the place of its token vectors
    filler             the token with which every text is filled up to max_tokens, and which counts; None: none is
    """

    architecture: str
    pooling: PoolingMode
    bidirectional: bool
    max_tokens: int
    prompts: dict[str, str]
    pool_prompt: bool
    dim: int
    added_dropout: float = 0.0
    trust_remote_code: bool = False
    normalize: bool = True
    latent: Latent | None = None
    mean_layers: int = 1
    layers: tuple[int, ...] = ()
    head: tuple[Dense, ...] = ()
    head_use: Literal["training", "kept"] = "kept"
    query_length: int | None = None
    mask_id: int | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    reads: str = "text"
    own_pooling: bool = False
    code: str | None = None
    template: str | None = None
    filler: int | None = None

    @classmethod
    def of_media(cls, reads: str, hidden: int, dim: int, tokens: int, normalize: bool = True) -> ModelSpec:
        """Of a tower of items that are no texts: the mean of its states [L, hidden] by a linear map to `dim`.

        tokens  L of an item, at most
        """
        return cls(
            architecture=reads,
            pooling="mean",
            bidirectional=True,
            max_tokens=tokens,
            prompts={"query": "", "document": ""},
            pool_prompt=True,
            dim=dim,
            normalize=normalize,
            head=(Dense(hidden, dim, bias=False),),
            reads=reads,
        )

    @property
    def in_sentence_transformers(self) -> bool:
        """Whether that format can say what the tower does: of texts all but padding that counts, of images one vector
        each, of other kinds nothing, and a vision–language model it would show images in another template."""
        if self.reads == "text":
            return self.filler is None
        return self.reads == "image" and self.pooling != "tokens"

    @property
    def hidden(self) -> int:
        """H, the width of the backbone's token vectors."""
        return self.head[0].inputs if self.head else self.dim

    @property
    def training_dim(self) -> int:
        """D of the vectors that the loss sees."""
        one = self.head[-1].outputs if self.head else self.dim
        return one * max(1, len(self.layers))

    @property
    def needs_queries(self) -> bool:
        """Whether a query is encoded otherwise than a document, beyond its prompt."""
        return self.query_length is not None or bool(self.skipped)

    def exported(self) -> ModelSpec:
        """Without what only training sees."""
        head = self.head if self.head_use == "kept" else ()
        return replace(self, layers=(), head=head, head_use="kept", added_dropout=0.0)

    def save(self, folder: Path) -> None:
        (folder / SPEC_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ModelSpec:
        try:
            values = json.loads((folder / SPEC_FILE).read_text())
        except FileNotFoundError:
            raise UsageError(f"{folder} is no model folder of gyre: it has no {SPEC_FILE}") from None
        values["layers"] = tuple(values.get("layers", ()))
        values["head"] = tuple(Dense(**layer) for layer in values.get("head", ()))
        values["latent"] = Latent(**values["latent"]) if values.get("latent") else None
        return cls(**values)
