"""Latent attention (NV-Embed, Lee et al. 2024, arXiv:2405.17428, section 3.2).

This file is copied into the folders of exported models that have it, where Sentence Transformers runs it
(`trust_remote_code=True`): it needs nothing but torch and safetensors.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


class LatentAttention(nn.Module):
    """Token vectors that have attended to learned ones: hidden [..., H] -> [..., H].

    y = h + O·A(LN(h)·Q, LN(latents)·K, LN(latents)·V),   out = y + W₂(GEGLU(W₁·LN(y)))

    with soft-max attention A of `heads` heads over the `count` latents, and a feed-forward block of width 4H, as the
    released NV-Embed-v2 has it; its heads are H wide each, these H / heads. The mean over the tokens follows.
    """

    def __init__(self, hidden: int, count: int, heads: int) -> None:
        super().__init__()
        self.width = hidden // heads
        self.latents = nn.Parameter(torch.randn(count, hidden))
        self.norm, self.latent_norm, self.feed_norm = (nn.LayerNorm(hidden) for _ in range(3))
        self.query, self.out = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.key_value = nn.Linear(hidden, 2 * hidden, bias=False)
        self.widen, self.narrow = nn.Linear(hidden, 8 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])  # latents are the same for every text: one long sequence
        key, value = self._split(self.key_value(self.latent_norm(self.latents))).chunk(2)
        seen = F.scaled_dot_product_attention(self._split(self.query(self.norm(tokens))), key, value)
        tokens = tokens + self.out(seen.transpose(0, 1).flatten(1))
        wide, gate = self.widen(self.feed_norm(tokens)).chunk(2, dim=-1)
        return (tokens + self.narrow(wide * F.gelu(gate))).view_as(hidden)

    def _split(self, x: Tensor) -> Tensor:
        """[m, k·H] -> [k·heads, m, H / heads]"""
        return x.unflatten(-1, (-1, self.width)).transpose(0, 1)


class LatentAttentionModule(nn.Module):
    """It as a module of Sentence Transformers, between Transformer and Pooling."""

    def __init__(self, hidden: int, count: int, heads: int) -> None:
        super().__init__()
        self.config = {"hidden": hidden, "count": count, "heads": heads}
        self.attention = LatentAttention(hidden, count, heads)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features["token_embeddings"] = self.attention(features["token_embeddings"])
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        Path(output_path, "config.json").write_text(json.dumps(self.config))
        save_file(self.attention.state_dict(), Path(output_path, "model.safetensors"))
        # Sentence Transformers looks for the code in the root, but saves it in the module's own folder.
        shutil.copy(__file__, Path(output_path).parent)

    @classmethod
    def load(cls, input_path: str) -> LatentAttentionModule:
        module = cls(**json.loads(Path(input_path, "config.json").read_text()))
        module.attention.load_state_dict(load_file(Path(input_path, "model.safetensors")))
        return module
