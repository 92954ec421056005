"""Towers under the engine: sharded or not, one step changes the same weights by the same amount."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.trainers.encoders.tiny import TINY, padded, tiny
from trainers.config import EngineConfig, ModelConfig, OptimizerConfig
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.text import build_encoder
from trainers.engine import Engine

CHOICES = {
    "latent attention, two layers of head": {
        "pooling": "latent",
        "latent": {"count": 5, "heads": 2},
        "head": {"sizes": [24, 8]},
    },
    "several layers, some frozen, recomputed": {
        "layers": [1, 2],
        "head": {"sizes": [8], "use": "training"},
        "freeze": ["*.layers.0.*"],
        "gradient_checkpointing": True,
    },
    "a vector for each token": {"pooling": "tokens", "token_dim": 8, "skip_punctuation": True},
}


def weights_after_a_step(keys: dict, folder: Path, stage: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(config=TINY.model_copy(update={"dropout": 0.0}), **keys), folder)
    optimizer = OptimizerConfig(lr=1e-2, eps=1e-3, clip_norm=0.0)
    engine = Engine(encoder, EngineConfig(zero_stage=stage, precision="fp32"), optimizer, 2)
    torch.manual_seed(1)
    ids, mask = padded([3, 9, 5, 9, 2])
    queries = torch.tensor([True, False, True, False, False])
    engine.train()
    upstream = torch.randn_like(engine.forward(inputs=TowerInputs(ids, mask, queries=queries)))
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    output = engine.forward(inputs=TowerInputs(ids[mine], mask[mine], queries=queries[mine]))
    engine.backward([output], [upstream[mine]], last=True)
    engine.step()
    return engine.full_weights()


@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_at_zero_3_on_two_workers_is_that_of_one(gloo, tmp_path, choice):
    keys = CHOICES[choice]
    encoder, _ = tiny(tmp_path / "m", TINY.model_copy(update={"dropout": 0.0}), **keys)
    (whole,) = gloo(1, weights_after_a_step, keys, tmp_path / "m", 0)
    sharded, _ = gloo(2, weights_after_a_step, keys, tmp_path / "m", 3)
    assert whole.keys() == sharded.keys() == dict(encoder.named_parameters()).keys()
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=1e-4, atol=1e-5, msg=name)
