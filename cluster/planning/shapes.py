"""The sizes of a transformer, and what follows from them: parameters, and floating-point operations of a token.

Legend (beside the project's W, B, b, D): H width of the residual stream, A width of the queries (heads x their width),
V width of keys and of values (fewer heads, the same width of each), I width of the feed-forward layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_services.schema import UsageError
from trainers.config import FromConfig, ModelConfig

GATED = frozenset({"qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text", "phi3"})
"""model_types whose feed-forward layer has a gate: three matrices, not two."""
NORMS_HEADS = frozenset({"qwen3", "gemma3_text"})
"""model_types that normalise every head's queries and keys."""


@dataclass(frozen=True)
class Shape:
    """A transformer encoder without a language-model head.

    gated        whether the feed-forward layer has a gate
    norms_heads  whether each head's queries and keys are normalised
    """

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    gated: bool = True
    norms_heads: bool = True

    @property
    def query_width(self) -> int:
        """A"""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """V"""
        return self.key_heads * self.head_dim

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix of a layer."""
        h, a, v, i = self.hidden, self.query_width, self.key_width, self.intermediate
        attention = {"q": (h, a), "k": (h, v), "v": (h, v), "o": (a, h)}
        return attention | {"up": (h, i), "down": (i, h)} | ({"gate": (h, i)} if self.gated else {})

    @property
    def layer_parameters(self) -> int:
        norms = 2 * self.hidden + (2 * self.head_dim if self.norms_heads else 0)
        return sum(inputs * outputs for inputs, outputs in self.matrices.values()) + norms

    @property
    def table_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Token table, layers, final norm."""
        return self.table_parameters + self.layers * self.layer_parameters + self.hidden

    def elements_up_to(self, size: int) -> int:
        """Elements of the matrices and norms that have at most `size` each."""
        matrices = [inputs * outputs for inputs, outputs in self.matrices.values()]
        small = self.layer_parameters - sum(matrices) + sum(n for n in matrices if n <= size)
        return self.layers * small + self.hidden + (self.table_parameters if self.table_parameters <= size else 0)

    def adapter_parameters(self, rank: int) -> int:
        """A and B of low-rank updates of every matrix of every layer: rank (inputs + outputs) each (Hu et al. 2021)."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.matrices.values())

    def forward_flops(self, length: float) -> float:
        """Of one token of a text of `length` tokens, forward: two for each weight that multiplies it, and per layer
        4 L A for scores and the weighted sum; a causal mask is counted as if it were none (PaLM, Chowdhery et al.
        2022, appendix B)."""
        weights = self.parameters - self.table_parameters
        return 2.0 * weights + 4.0 * self.layers * length * self.query_width


# The config.json of Qwen/Qwen3-Embedding-0.6B, -4B and -8B; D is H.
PRESETS = {
    "qwen3-embedding-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151_669),
    "qwen3-embedding-4b": Shape(2560, 36, 32, 8, 128, 9728, 151_665),
    "qwen3-embedding-8b": Shape(4096, 36, 32, 8, 128, 12_288, 151_665),
}
_BASES = {f"qwen3-{size}": PRESETS[f"qwen3-embedding-{size}"] for size in ("0.6b", "4b", "8b")}


def shape_of(model: ModelConfig) -> Shape:
    """The sizes of a recipe's text tower: of `model.config`, of the folder `model.path`, or of a known hub id.

    Raises UsageError where there are other towers beside it, or none of the three says the sizes.
    """
    if model.kinds != ("text",) or model.towers == "separate" or model.encoder is not None:
        raise UsageError("gyre plan counts one text tower: the recipe's model has others, or is your own")
    if model.config is not None:
        return _from_section(model.config)
    assert model.path is not None, "ModelConfig has exactly one of path and config"
    for file in (Path(model.path) / "config.json", Path(model.path) / "0_Transformer" / "config.json"):
        if file.is_file():
            return from_transformers(json.loads(file.read_text()), str(file))
    return preset(model.path.rsplit("/", 1)[-1])


def preset(name: str) -> Shape:
    """One of PRESETS, by its name or the name of its base model, in any case."""
    known = PRESETS | _BASES
    if name.lower() not in known:
        raise UsageError(
            f"the sizes of {name!r} aren't known here: give model.path a folder with its config.json, or one "
            f"of {', '.join(PRESETS)}"
        )
    return known[name.lower()]


def from_transformers(config: Mapping[str, Any], where: str) -> Shape:
    """Of a config.json of transformers, a decoder's or an encoder's. Raises UsageError naming the key it lacks."""
    kind = str(config.get("model_type", ""))
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            key_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            gated=kind in GATED,
            norms_heads=kind in NORMS_HEADS,
        )
    except KeyError as error:
        raise UsageError(f"{where} has no {error.args[0]}: gyre plan reads configs of text transformers") from None


def _from_section(config: FromConfig) -> Shape:
    head_dim = config.head_dim or config.hidden // config.heads
    return Shape(
        hidden=config.hidden,
        layers=config.layers,
        heads=config.heads,
        key_heads=config.heads,
        head_dim=head_dim,
        intermediate=config.intermediate,
        vocabulary=config.vocabulary,
        gated=config.architecture in GATED,
        norms_heads=config.architecture in NORMS_HEADS,
    )
