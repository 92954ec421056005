"""What the engine shards: the tower, the few scalars that the objective learns beside it, and an auxiliary head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainers.encoders.inputs import TowerInputs

TOWER = "tower."  # before the tower's names in `Trained.state_dict()`


class Scalars(nn.Module):
    """Learned scalars by name. What trains is the way from the start value: bf16 is fine near 0, coarse near 5."""

    def __init__(self, start: Mapping[str, float]) -> None:
        super().__init__()
        self.names, self._start = tuple(start), list(start.values())  # no buffer: the engine would round it to bf16
        self.moved = nn.Parameter(torch.zeros(len(start)))

    def forward(self) -> Tensor:
        """[k] float32, in the order of `names`."""
        moved = self.moved.float()
        return moved.new_tensor(self._start) + moved


class Trained(nn.Module):
    """The tower (one encoder, or `Towers`), the objective's learned scalars and, on token states, an auxiliary head
    (trainers/objectives/masked_lm.py), with one forward."""

    def __init__(self, tower: Any, learned: Mapping[str, float], head: Any = None) -> None:
        super().__init__()
        self.tower, self.head = tower, head
        self.learned = Scalars(learned) if learned else None

    def forward(self, inputs: TowerInputs) -> tuple[Tensor, Tensor, Tensor]:
        """A chunk's inputs -> (what the tower makes of them, learned scalars [k], the head's sum over the chunk and its
        number of terms [2]); the last two are empty where there is none, the last in eval mode too."""
        vectors = self.tower(inputs)
        learned = vectors.new_zeros(0) if self.learned is None else self.learned()
        return vectors, learned, self._auxiliary(inputs) if self.head and self.training else vectors.new_zeros(0)

    def _auxiliary(self, inputs: TowerInputs) -> Tensor:
        altered, targets = self.head.alter(inputs.ids, inputs.mask, inputs.prompt_tokens)
        total, count = self.head(self.tower.token_states(altered, inputs.mask), targets)
        return torch.stack([total, count.to(total)])

    @property
    def learned_names(self) -> tuple[str, ...]:
        return self.learned.names if self.learned else ()
