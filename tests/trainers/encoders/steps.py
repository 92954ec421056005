"""A step on one or more workers against the dense twin of the whole batch, whatever the towers."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from data_services.assemble import GlobalBatch
from data_services.collate import share_batch
from data_services.schema import Batch, Inputs
from tests.trainers.test_step import BETA
from tests.twins import dense_contrastive
from trainers.chunks import chunk_of, keys_of
from trainers.collectives import Group
from trainers.config import EngineConfig, MomentumConfig, OptimizerConfig
from trainers.model import Trained
from trainers.objectives.compose import Sum
from trainers.objectives.embedded import Embedded
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.step import ContrastiveStep, Memory

CPU = torch.device("cpu")
OBJECTIVE = ContrastiveSection(temperature=0.1)
DECAY = 0.9


def make_step(model: Trained, stage: int, cached: bool) -> ContrastiveStep:
    """With a momentum encoder and no queue; no clipping or decay, so that the moments are the gradients."""
    from trainers.ema import MomentumEncoder
    from trainers.engine import Engine

    group, optimizer = Group(), OptimizerConfig(clip_norm=0, betas=(BETA, 0.98), weight_decay=0)
    engine = Engine(model, EngineConfig(zero_stage=stage, precision="fp32"), optimizer, 10, CPU)
    memory = Memory(MomentumEncoder(engine, MomentumConfig(decay=DECAY)), None)
    return ContrastiveStep(engine, Sum([OBJECTIVE], group), memory, cached=cached, seed=0, group=group)


@dataclass
class Taken:
    """What a worker has of a step: the loss, its shares of the gradients by name, and where each begins and how long it
    is, in the order of the trained weights."""

    loss: float
    gradients: dict[str, Tensor]
    layout: Tensor
    trained: list[str]


def share_of(batch: GlobalBatch, budget: int) -> Batch:
    """This worker's."""
    return share_batch(batch, Group().size, budget)[Group().rank]


def take(step: ContrastiveStep, share: Batch) -> Taken:
    loss, state = step(share)["loss"], step.engine.state()
    gradients = {n.removeprefix("exp_avg/"): t / (1 - BETA) for n, t in state.items() if n.startswith("exp_avg/")}
    trained = [name for name, p in step.engine.module.named_parameters() if p.requires_grad]
    return Taken(loss, gradients, state["layout"], trained)


Twin = tuple[float, dict[str, Tensor | None]]


def twin_of(model: Trained, batch: GlobalBatch) -> Twin:
    """(loss, gradients) of the whole batch in one process in float64, each item by itself."""
    model = model.double().train()

    def encoded(items: Inputs, queries: bool) -> Tensor:
        rows = []
        for i in range(len(items)):
            one = items.take(np.array([i]))
            tower = None if one.towers is None else int(one.towers[0])
            chunk = chunk_of(one, np.zeros(1, np.int64), np.array([queries]), CPU, tower=tower)
            rows.append(model.tower(chunk.inputs).double())
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


def assert_twins(answers: list[Taken], twin: Twin, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """The workers' shares together are the twin's gradients; a weight that it doesn't reach has one of zero."""
    loss, gradients = twin
    assert [answer.loss for answer in answers] == pytest.approx([loss] * len(answers), abs=1e-5)
    names = answers[0].trained
    assert set(names) == set(gradients)
    for i, name in enumerate(names):
        gradient = gradients[name]
        gradient = torch.zeros(1, dtype=torch.float64) if gradient is None else gradient.flatten()
        found = torch.full((gradient.numel(),), torch.nan, dtype=torch.float64)
        for answer in answers:
            start, length, _ = answer.layout[i].tolist()
            if length:
                found[start : start + length] = answer.gradients[name].double()
        torch.testing.assert_close(found, gradient, rtol=rtol, atol=atol, msg=name)
