"""Promise 1: loss and every gradient of a step equal the dense float64 twin, at any world size and ZeRO stage."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data_services.collate import GlobalBatch, share_batch
from data_services.schema import Ragged
from tests.twins import Share, dense_contrastive, random_rows
from trainers.collectives import Group
from trainers.config import EngineConfig, MomentumConfig, ObjectiveConfig, OptimizerConfig, QueueConfig
from trainers.objectives.contrastive import Contrastive, Ids
from trainers.step import ContrastiveStep, Memory, choose_caching, graph_bytes

VOCABULARY, DIM, BETA = 50, 16, 0.9
OBJECTIVE = ObjectiveConfig(temperature=0.1, tile=7)


class Tower(nn.Module):
    """A small encoder with a matrix, a norm and, on request, dropout; unused rows of the table get no gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.out = nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids, attention_mask, prompt_tokens=None):
        hidden = self.dropout(torch.tanh(self.out(self.norm(self.table(input_ids)))))
        mask = attention_mask[..., None].to(hidden.dtype)
        return F.normalize(((hidden * mask).sum(1) / mask.sum(1)).float().to(_wide(hidden)), dim=-1)


def _wide(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def tower(dropout=0.0):
    torch.manual_seed(1)
    return Tower(dropout)


def batch_of(step, queries=13, negatives=5):
    """A global batch that divides by nothing, with repeated queries and documents and a few hard negatives."""
    random = np.random.default_rng(step)

    def texts(n):
        return Ragged.of([random.integers(1, VOCABULARY, random.integers(1, 9)) for _ in range(n)])

    return GlobalBatch(
        step=step,
        queries=texts(queries),
        documents=texts(queries + negatives),
        owners=random.integers(0, queries, negatives),
        query_ids=random.integers(0, 9, queries),
        document_ids=random.integers(0, 20, queries + negatives),
        rows=np.arange(queries),
    )


def stored_rows():
    return random_rows(5, 11, DIM, distinct=20)


def twin_gradients(batch, with_queue):
    """(loss, {name: gradient}) of the whole batch in one process in float64."""
    model = tower().double()

    def encode(texts):
        ids, mask = (torch.from_numpy(x) for x in texts.padded())
        return model(ids, mask)

    queries, documents = encode(batch.queries), encode(batch.documents)
    ids = Ids(torch.from_numpy(batch.query_ids), torch.from_numpy(batch.document_ids))
    dense = dense_contrastive(
        [Share(queries.detach(), documents.detach(), ids)], OBJECTIVE, stored_rows() if with_queue else None
    )
    torch.autograd.backward([queries, documents], [dense.query_gradients[0], dense.document_gradients[0]])
    return dense.loss, {name: p.grad for name, p in model.named_parameters()}


def make_step(stage, cached, with_queue, precision="fp32", dropout=0.0):
    from trainers.ema import MomentumEncoder
    from trainers.engine import Engine
    from trainers.negative_queue import NegativeQueue

    group = Group()
    config = EngineConfig(zero_stage=stage, precision=precision)
    optimizer = OptimizerConfig(clip_norm=0, betas=(BETA, 0.98), weight_decay=0)
    engine = Engine(tower(dropout), config, optimizer, total_steps=10, device="cpu")
    memory = None
    if with_queue:
        queue = NegativeQueue(QueueConfig(rows=11), DIM, group)
        rows = stored_rows()
        whole = {
            "vectors": rows.vectors.float(),
            "document_ids": rows.document_ids,
            "query_ids": rows.query_ids,
            "steps": rows.steps,
            "sequence": torch.arange(11),
            "next": torch.tensor([11]),
        }
        empty = {name: tensor[:0] if name != "next" else tensor for name, tensor in whole.items()}
        queue.restore([whole, *([empty] * group.size)])
        memory = Memory(MomentumEncoder(engine, lambda: tower(dropout), MomentumConfig(decay=0.9)), queue)
    objective = Contrastive(OBJECTIVE, group)
    return ContrastiveStep(engine, objective, memory, cached=cached, seed=0, rank=group.rank), group


def first_gradients(stage, cached, with_queue):
    """The loss and this worker's share of every gradient: AdamW's first moment after one step is (1-beta) of it."""
    step, group = make_step(stage, cached, with_queue)
    mine = share_batch(batch_of(0), group.size, budget_tokens=24)[group.rank]
    metrics = step(mine)
    state = step.engine.state()
    moments = {name: t / (1 - BETA) for name, t in state.items() if name.startswith("exp_avg/")}
    return metrics, moments, state["layout"]


def assembled(answers):
    """{name: flat gradient} from the shares of all workers."""
    names = [name for name, _ in tower().named_parameters()]
    whole = {name: torch.full((p.numel(),), torch.nan) for name, p in tower().named_parameters()}
    for _, moments, layout in answers:
        for i, name in enumerate(names):
            start, length, _ = layout[i].tolist()
            if length:
                whole[name][start : start + length] = moments[f"exp_avg/{name}"]
    return whole


def check_world(gloo, world_size, stage, cached, with_queue):
    loss, gradients = twin_gradients(batch_of(0), with_queue)
    answers = gloo(world_size, first_gradients, stage, cached, with_queue)
    assert all(metrics["loss"] == pytest.approx(loss, abs=1e-5) for metrics, _, _ in answers)
    found = assembled(answers)
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name].double(), gradient.flatten(), rtol=1e-4, atol=1e-6 * float(norm) + 1e-6)
    assert answers[0][0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


# Every pair of (world size, stage, cached, queue) values occurs.
COVERING = [
    (1, 0, False, False),
    (1, 1, True, True),
    (1, 2, False, True),
    (1, 3, True, False),
    (2, 0, True, True),
    (2, 1, False, False),
    (2, 2, True, False),
    (2, 3, False, True),
]
EVERY = list(itertools.product((1, 2, 3, 4), (0, 1, 2, 3), (False, True), (False, True)))


@pytest.mark.parametrize(("world_size", "stage", "cached", "with_queue"), COVERING)
def test_loss_and_gradients_equal_the_dense_twin(gloo, world_size, stage, cached, with_queue):
    check_world(gloo, world_size, stage, cached, with_queue)


@pytest.mark.proof
@pytest.mark.parametrize(("world_size", "stage", "cached", "with_queue"), EVERY)
def test_loss_and_gradients_equal_the_dense_twin_everywhere(gloo, world_size, stage, cached, with_queue):
    check_world(gloo, world_size, stage, cached, with_queue)


def run_two_steps(cached, precision):
    step, group = make_step(2, cached, True, precision, dropout=0.3)
    metrics = [step(share_batch(batch_of(t), group.size, 24)[group.rank]) for t in range(2)]
    rows = step.memory.queue.rows()
    return [m["loss"] for m in metrics], step.engine.state(), rows.vectors, rows.document_ids


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_caching_draws_the_dropout_of_the_graphs_it_replaces(gloo, precision):
    for direct, cached in zip(
        gloo(2, run_two_steps, False, precision), gloo(2, run_two_steps, True, precision), strict=True
    ):
        assert direct[0][0] == cached[0][0]
        for name, tensor in direct[1].items():
            if name.startswith("exp_avg/"):
                torch.testing.assert_close(cached[1][name], tensor, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(cached[2], direct[2], rtol=1e-3, atol=1e-4)
        assert torch.equal(cached[3], direct[3])


def queue_after_a_step():
    """What the queue holds after one step, against the averaged model's own encodings."""
    step, group = make_step(0, False, True)
    mine = share_batch(batch_of(0), group.size, 24)[group.rank]
    step(mine)
    ids, mask = (torch.from_numpy(x) for x in mine.documents.padded())
    expected = step.memory.encoder.forward(input_ids=ids, attention_mask=mask)
    rows = step.memory.queue.rows()
    return rows.vectors, rows.document_ids, expected[-11:], torch.from_numpy(mine.document_ids)[-11:], rows.query_ids


def test_the_queue_takes_the_averaged_encodings_of_the_documents(gloo):
    vectors, document_ids, expected, expected_ids, query_ids = gloo(1, queue_after_a_step)[0]
    torch.testing.assert_close(vectors, expected)
    assert torch.equal(document_ids, expected_ids)
    assert (query_ids[-5:] == -(2**63)).all()  # hard negatives answer no query


def caching_choices():
    step, _ = make_step(0, False, False)
    engine, size = step.engine, graph_bytes(step.engine, 8)
    return size, [
        choose_caching(engine, "on", 1, 8, 1 << 40),
        choose_caching(engine, "off", 1e12, 8, 0),
        choose_caching(engine, "auto", 10, 8, int(10 * size)),
        choose_caching(engine, "auto", 11, 8, int(10 * size)),
    ]


def test_caching_is_chosen_from_what_a_graph_keeps(gloo):
    size, choices = gloo(1, caching_choices)[0]
    assert 8 * DIM * 4 < size < 8 * DIM * 4 * 20
    assert choices == [True, False, False, True]
