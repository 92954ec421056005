"""The tower of items of parts (title, body, photo): the weighted sum of the parts' vectors, brought to length one.

Each part runs through the tower of its kind, whose weights are shared with the items that are of that kind alone. What
an item lacks is left out of its sum. Shapes: n items, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.config import ModelConfig
from trainers.encoders.inputs import TowerInputs, lengths_of
from trainers.encoders.spec import ModelSpec
from trainers.encoders.tower import Tower
from trainers.tower_config import FieldsConfig

if TYPE_CHECKING:
    from data_services.schema import Tokenize

SETTINGS, WEIGHTS, READS = "gyre_fields.json", "model.safetensors", "parts"
TOKENS = "tokens"


class FieldsTower(Tower):
    """The tower of items of parts. Of a chunk it reads `arrays["PART.ARRAY"]`: what the tower of the part's kind reads,
    and `PART.tokens` of a text.

    towers  by kind, those that the parts run through; not this one's own
    """

    def __init__(self, config: FieldsConfig, spec: ModelSpec) -> None:
        super().__init__(nn.Identity(), spec)
        self.names = tuple(config.weights)
        start = torch.tensor([math.log(weight) for weight in config.weights.values()])
        self.log_weights = nn.Parameter(start, requires_grad=config.learned)
        self.towers: dict[str, Tower] = {}

    def forward(self, inputs: TowerInputs) -> Tensor:
        """What the loss sees, [n, D] float32 of length one; the zero vector of an item without parts."""
        return self._sum(inputs, training=True)

    def embed(self, inputs: TowerInputs) -> Tensor:
        return self._sum(inputs, training=False)

    def token_counts(self, inputs: TowerInputs) -> Tensor:
        return inputs.mask.sum(1)

    def flops_per_token(self, length: float) -> float:
        """The mean over the towers of the parts: which tokens are whose isn't counted."""
        return sum(tower.flops_per_token(length) for tower in self.towers.values()) / len(self.towers)

    def _sum(self, inputs: TowerInputs, training: bool) -> Tensor:
        n = len(inputs.ids)
        total = inputs.ids.new_zeros(n, self.dim, dtype=torch.float32)
        for name, weight in zip(self.names, self.log_weights.float().exp(), strict=True):
            for kind, own in _by_kind(_below(inputs.arrays, name), self.towers).items():
                total = total + weight * self._vectors(kind, own, inputs.queries, n, training)
        return F.normalize(total, dim=-1)

    def _vectors(self, kind: str, own: Mapping[str, Tensor], queries: Tensor | None, n: int, training: bool) -> Tensor:
        """[n, D] of one part; zeros where an item lacks it. The tower runs even where all do, as on other workers."""
        lengths = next(own[key] for key in own if key.endswith(lengths_of("")))
        there = lengths.nonzero()[:, 0]
        inputs = _inputs(kind, own, lengths, there)
        if queries is not None:
            inputs = replace(inputs, queries=queries[there] if len(there) else queries[:1])
        tower = self.towers[kind]
        found = tower(inputs) if training else tower.embed(inputs)
        if not len(there):
            return 0.0 * found.sum() + found.new_zeros(n, self.dim)
        return found.new_zeros(n, self.dim).index_copy(0, there, found)


def _by_kind(own: Mapping[str, Tensor], towers: Mapping[str, Tower]) -> dict[str, dict[str, Tensor]]:
    """A part's arrays by kind, which stands between its name and the array's: `KIND.ARRAY`."""
    return {kind: its for kind in towers if (its := _below(own, kind))}


def _below(arrays: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those whose names begin with `name.`, by what follows."""
    return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}


def _inputs(kind: str, own: Mapping[str, Tensor], lengths: Tensor, there: Tensor) -> TowerInputs:
    """What a part's tower is called with, for the items that have it; for one of nothing where none does."""
    if kind == "text":
        rows = own[TOKENS].long().split(lengths[there].tolist()) if len(there) else [lengths.new_zeros(1)]
        ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        counts = lengths[there] if len(there) else lengths.new_ones(1)
        mask = (torch.arange(ids.shape[1], device=ids.device) < counts[:, None]).long()
        return TowerInputs(ids, mask, prompt_tokens=torch.zeros_like(counts))
    some = lengths.new_ones(max(1, len(there)), 1)
    arrays = {key: x[there] if key.endswith(lengths_of("")) and len(there) else x for key, x in own.items()}
    return TowerInputs(some * 0, some, arrays=arrays)


def prepare(config: ModelConfig, folder: Path, texts: ModelSpec) -> None:
    """Writes the folder that `build` loads, see `Modality.prepare`."""
    assert config.fields is not None, "asked for by a recipe that has them"
    spec = ModelSpec.of_media(READS, texts.dim, texts.dim, texts.max_tokens, texts.normalize)
    (folder / SETTINGS).write_text(config.fields.model_dump_json(indent=2) + "\n")
    replace(spec, head=()).save(folder)


def build(config: ModelConfig, folder: Path) -> FieldsTower:
    """See `Modality.build`; `towers` is filled by `Towers`."""
    settings = FieldsConfig.model_validate_json((folder / SETTINGS).read_text())
    return FieldsTower(settings, ModelSpec.load(folder))


def load(folder: Path, attention: str = "auto") -> FieldsTower:
    """See `Modality.load`."""
    from safetensors.torch import load_file

    settings = FieldsConfig.model_validate_json((folder / SETTINGS).read_text())
    tower = FieldsTower(settings, ModelSpec.load(folder))
    tower.load_state_dict(load_file(folder / WEIGHTS))
    return tower.eval()


def reader_of(readers: Mapping[str, Tokenize], folder: Path) -> Tokenize:
    """What makes the inputs of items of parts, of the readers of their kinds."""
    from data_services.inputs import Parts

    settings = FieldsConfig.model_validate_json((folder / SETTINGS).read_text())
    return Parts(readers, tuple(settings.weights))
