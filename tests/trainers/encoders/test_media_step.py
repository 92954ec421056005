"""A step of towers of texts, images and sounds: the gradients of the whole batch, whoever holds which of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.models import tokenizer_of
from data_services.assemble import GlobalBatch
from data_services.collate import share_batch
from data_services.schema import Inputs
from tests.trainers.encoders.sounds import tone
from tests.trainers.encoders.test_image import PICTURES, SIZES, png
from tests.trainers.encoders.tiny import TEXTS, TINY, scrambled, train_tokenizer
from tests.trainers.test_step import BETA
from tests.twins import dense_contrastive
from trainers.chunks import chunk_of, keys_of
from trainers.collectives import Group
from trainers.config import EngineConfig, ModelConfig, MomentumConfig, OptimizerConfig
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.towers import build_towers, prepare_towers
from trainers.model import Trained
from trainers.objectives.compose import Sum
from trainers.objectives.embedded import Embedded
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.step import ContrastiveStep, Memory, choose_caching
from trainers.tower_config import AudioConfig, ImageConfig, ImageFromConfig

CPU = torch.device("cpu")
OBJECTIVE = ContrastiveSection(temperature=0.1)
CONFIG = ModelConfig(
    config=TINY.model_copy(update={"dropout": 0.0}),
    image=ImageConfig(config=ImageFromConfig(**SIZES)),
    audio=AudioConfig(rate=8000, mels=8, window=200, hop=80, max_seconds=1, hidden=12, layers=2, kernel=3),
    max_tokens=40,
)
SOUNDS = [tone(hertz, seconds) for hertz, seconds in ((440, 0.1), (880, 0.35), (220, 1.5))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("image-step") / "m"
    prepare_model_folder(CONFIG, place, train_tokenizer)
    prepare_towers(CONFIG, place)
    return place


def model_of(folder):
    torch.manual_seed(3)
    return Trained(scrambled(build_towers(CONFIG, folder)), {})


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


def first_gradients(folder, stage, cached):
    """The loss, this worker's share of every gradient, how it lies there, and whether `auto` would cache."""
    from trainers.ema import MomentumEncoder
    from trainers.engine import Engine

    group, optimizer = Group(), OptimizerConfig(clip_norm=0, betas=(BETA, 0.98), weight_decay=0)
    engine = Engine(model_of(folder), EngineConfig(zero_stage=stage, precision="fp32"), optimizer, 10, CPU)
    small, large = (choose_caching(engine, "auto", 4, 20, allowed) for allowed in (10**9, 1))
    memory = Memory(MomentumEncoder(engine, MomentumConfig(decay=0.9)), None)
    step = ContrastiveStep(engine, Sum([OBJECTIVE], group), memory, cached=cached, seed=0, group=group)
    batch = share_batch(global_batch(folder), group.size, 60)[group.rank]
    metrics = step(batch)
    state = step.engine.state()
    moments = {n.removeprefix("exp_avg/"): t / (1 - BETA) for n, t in state.items() if n.startswith("exp_avg/")}
    trained = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    return metrics["loss"], moments, state["layout"], trained, (small, large), step.flops(batch)


def twin(folder):
    """(loss, gradients) of the whole batch in one process in float64, each item by itself."""
    model = model_of(folder).double().train()
    batch = global_batch(folder)

    def encoded(items: Inputs, queries: bool):
        rows = []
        for i in range(len(items)):
            one = items.take(np.array([i]))
            chunk = chunk_of(one, np.zeros(1, np.int64), np.array([queries]), CPU, tower=int(one.towers[0]))
            rows.append(model.tower(**chunk.inputs).double())
        return torch.cat(rows)

    queries, documents = encoded(batch.queries, True), encoded(batch.documents, False)
    share = Embedded(
        queries.detach(),
        documents.detach(),
        *keys_of(batch, None, CPU),
        torch.from_numpy(batch.owners),
        len(queries),
        momentum_queries=torch.zeros_like(queries),
        momentum_documents=torch.zeros_like(documents),
    )
    dense = dense_contrastive([share], OBJECTIVE, None, {})
    torch.autograd.backward([queries, documents], [dense.query_gradients[0], dense.document_gradients[0]])
    return dense.loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("world_size", "stage", "cached"), [(1, 0, False), (2, 2, True), (2, 3, True), (2, 3, False)])
def test_a_step_of_three_kinds_has_the_gradients_of_the_dense_twin(gloo, folder, world_size, stage, cached):
    loss, gradients = twin(folder)
    answers = gloo(world_size, first_gradients, folder, stage, cached)
    assert [answer[0] for answer in answers] == pytest.approx([loss] * world_size, abs=1e-5)
    names = answers[0][3]
    assert set(names) == set(gradients)
    for i, name in enumerate(names):
        gradient = gradients[name]
        found = torch.full((gradient.numel(),), torch.nan)
        for _, moments, layout, *_ in answers:
            start, length, _ = layout[i].tolist()
            if length:
                found[start : start + length] = moments[name]
        torch.testing.assert_close(found.double(), gradient.flatten(), rtol=1e-4, atol=1e-5, msg=name)
    assert [answer[4] for answer in answers] == [(False, True)] * world_size
    assert all(answer[5] > 0 for answer in answers)
