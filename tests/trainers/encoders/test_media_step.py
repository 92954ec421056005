"""A step of towers of texts, images and sounds: the gradients of the whole batch, whoever holds which of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.models import tokenizer_of
from data_services.assemble import GlobalBatch
from tests.trainers.encoders.sounds import tone
from tests.trainers.encoders.steps import assert_twins, make_step, share_of, take, twin_of
from tests.trainers.encoders.test_image import PICTURES, SIZES, png
from tests.trainers.encoders.tiny import TEXTS, TINY, scrambled, train_tokenizer
from trainers.config import ModelConfig
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.towers import build_towers, export_towers, prepare_towers
from trainers.model import Trained
from trainers.step import choose_caching
from trainers.tower_config import AdapterConfig, AudioConfig, ImageConfig, ImageFromConfig

CONFIG = ModelConfig(
    config=TINY.model_copy(update={"dropout": 0.0}),
    image=ImageConfig(config=ImageFromConfig(**SIZES)),
    audio=AudioConfig(rate=8000, mels=8, window=200, hop=80, max_seconds=1, hidden=12, layers=2, kernel=3),
    max_tokens=40,
)
SOUNDS = [tone(hertz, seconds) for hertz, seconds in ((440, 0.1), (880, 0.35), (220, 1.5))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return made(CONFIG, tmp_path_factory.mktemp("image-step") / "m")


def made(config, place) -> Path:
    prepare_model_folder(config, place, train_tokenizer)
    prepare_towers(config, place)
    return place


def model_of(folder, config=CONFIG):
    torch.manual_seed(3)
    return Trained(scrambled(build_towers(config, folder)), {})


def global_batch(folder) -> GlobalBatch:
    """Six pairs of texts, images and sounds in most ways, and a hard negative."""
    images = [png(picture) for picture in PICTURES]
    queries, documents = [*TEXTS[:4], images[4], SOUNDS[0]], [*images[:3], SOUNDS[1], TEXTS[4], SOUNDS[2], TEXTS[0]]
    inputs = tokenizer_of(folder)
    b, d = len(queries), len(documents)
    return GlobalBatch(
        step=0,
        queries=inputs(queries, "query"),
        documents=inputs(documents, "document"),
        owners=np.array([*range(b), 1]),
        relations=np.array([1] * b + [-1], np.int8),
        query_ids=np.arange(b),
        document_ids=10 + np.arange(d),
        rows=np.arange(b),
        prompt_tokens=np.zeros(b + d, np.int64),
    )


def first_gradients(folder, stage, cached, config=CONFIG):
    """What a worker has of the step, whether `auto` would cache, and the operations of its share."""
    step, share = make_step(model_of(folder, config), stage, cached), share_of(global_batch(folder), 60)
    small, large = (choose_caching(step.engine, "auto", 4, 20, allowed) for allowed in (10**9, 1))
    return take(step, share), (small, large), step.flops(share)


@pytest.mark.parametrize(
    ("world_size", "stage", "cached"),
    [
        (2, 2, True),
        (2, 3, False),
        *(pytest.param(*case, marks=pytest.mark.proof) for case in ((1, 0, False), (2, 2, False), (2, 3, True))),
    ],
)
def test_a_step_of_three_kinds_has_the_gradients_of_the_dense_twin(gloo, folder, world_size, stage, cached):
    answers = gloo(world_size, first_gradients, folder, stage, cached)
    assert_twins([taken for taken, *_ in answers], twin_of(model_of(folder), global_batch(folder)))
    assert [caches for _, caches, _ in answers] == [(False, True)] * world_size
    assert all(flops > 0 for *_, flops in answers)


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory) -> str:
    """The image tower of an export, as a model to begin from."""
    out = tmp_path_factory.mktemp("pretrained") / "out"
    return str(export_towers(build_towers(CONFIG, folder).state_dict(), folder, out, CONFIG) / "image")


@pytest.mark.parametrize(
    ("keys", "stage", "cached", "trained"),
    [
        ({"freeze": ["backbone.*"]}, 3, True, "readout"),  # a locked image tower (LiT)
        ({"adapter": AdapterConfig(rank=2, alpha=2)}, 2, False, "lora_"),
    ],
)
def test_one_tower_is_locked_or_learns_updates_alone_beside_others_that_train_whole(
    gloo, pretrained, tmp_path, keys, stage, cached, trained
):
    image = ImageConfig(path=pretrained, pooling="mean", **keys)
    config = CONFIG.model_copy(update={"image": image})
    folder = made(config, tmp_path / "m")
    answers = gloo(2, first_gradients, folder, stage, cached, config)
    assert_twins([taken for taken, *_ in answers], twin_of(model_of(folder, config), global_batch(folder)))
    names = answers[0][0].trained
    of_images = [name for name in names if name.startswith("tower.image.")]
    assert any(trained in name for name in of_images)
    assert all(trained in name or "readout" in name for name in of_images)
    assert any(name.startswith("tower.text.backbone.layers.0.") for name in names)
