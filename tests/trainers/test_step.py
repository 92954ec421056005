"""Promise 1: loss and every gradient of a step equal the dense float64 twin, at any world size and ZeRO stage."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data_services.collate import GlobalBatch, share_batch
from data_services.schema import UNKNOWN, Ragged
from tests.twins import dense_contrastive, random_rows, rows_of_worker
from trainers.chunks import keys_of
from trainers.collectives import Group
from trainers.config import AdapterConfig, EngineConfig, MomentumConfig, OptimizerConfig, QueueConfig
from trainers.encoders.adapters import add_adapter
from trainers.encoders.inputs import TowerInputs
from trainers.model import Trained
from trainers.objectives.compose import Sum
from trainers.objectives.embedded import Embedded
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.objectives.sections.numbers import Learned
from trainers.step import ContrastiveStep, Memory, choose_caching, graph_bytes

VOCABULARY, DIM, BETA = 50, 16, 0.9
OBJECTIVE = ContrastiveSection(temperature=Learned(start=0.1), tile=7)
LEARNED = {"log_temperature": math.log(0.1)}


class Tower(nn.Module):
    """A small encoder with a matrix, a norm and, on request, dropout; unused rows of the table get no gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.out = nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(dropout)

    gives_tokens, numbers = False, (None,)

    def forward(self, inputs):
        hidden = self.dropout(torch.tanh(self.out(self.norm(self.table(inputs.ids)))))
        mask = inputs.mask[..., None].to(hidden.dtype)
        return F.normalize(((hidden * mask).sum(1) / mask.sum(1)).float().to(_wide(hidden)), dim=-1)


def _wide(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def tower(dropout=0.0, kind="full"):
    """Trained whole, or ("lora", "dora") beside frozen weights with an update that is far from zero."""
    torch.manual_seed(1)
    made = Tower(dropout)
    if kind != "full":
        add_adapter(made, AdapterConfig(kind=kind, rank=3, dropout=dropout, targets=["out"], modules_to_save=["norm"]))
        nn.init.normal_(made.out.lora_B.default.weight, std=0.3)
    return made


def batch_of(step, queries=13, negatives=5):
    """A global batch that divides by nothing, with repeated queries and documents and a few hard negatives."""
    random = np.random.default_rng(step)

    def texts(n):
        return Ragged.of([random.integers(1, VOCABULARY, random.integers(1, 9)) for _ in range(n)])

    return GlobalBatch(
        step=step,
        queries=texts(queries),
        documents=texts(queries + negatives),
        owners=np.concatenate([np.arange(queries), random.integers(0, queries, negatives)]),
        relations=np.repeat([1, -1], [queries, negatives]).astype(np.int8),
        query_ids=random.integers(0, 9, queries),
        document_ids=random.integers(0, 20, queries + negatives),
        rows=np.arange(queries),
        prompt_tokens=np.zeros(2 * queries + negatives, np.int64),
    )


def stored_rows():
    """With the keys that a batch's documents have."""
    rows = random_rows(5, 11, DIM, distinct=20)
    return replace(rows, keys=replace(rows.keys, labels=None, tasks=None, rejects=torch.full((11,), UNKNOWN)))


def trained(dropout=0.0, kind="full"):
    return Trained(tower(dropout, kind), {f"0.{name}": start for name, start in LEARNED.items()})


def twin_gradients(batch, with_queue, kind="full"):
    """(loss, {name: gradient}) of the whole batch in one process in float64."""
    model = trained(kind=kind).double()

    def encode(texts):
        ids, mask = (torch.from_numpy(x) for x in texts.padded())
        return model.tower(TowerInputs(ids, mask))

    queries, documents = encode(batch.queries), encode(batch.documents)
    query_keys, document_keys = keys_of(batch, None, torch.device("cpu"))
    b, d = len(batch.queries), len(batch.documents)
    share = Embedded(
        queries.detach(),
        documents.detach(),
        query_keys,
        document_keys,
        torch.from_numpy(batch.owners),
        b,
        momentum_queries=torch.zeros(b, DIM),
        momentum_documents=torch.zeros(d, DIM),
    )
    dense = dense_contrastive([share], OBJECTIVE, {"documents": stored_rows()} if with_queue else None, LEARNED)
    torch.autograd.backward([queries, documents], [dense.query_gradients[0], dense.document_gradients[0]])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return dense.loss, gradients | {"learned.moved": dense.learned_gradients["log_temperature"][None]}


def make_step(stage, cached, with_queue, precision="fp32", dropout=0.0, kind="full", reduction="once"):
    from trainers.ema import MomentumEncoder
    from trainers.engine import Engine
    from trainers.negative_queue import Queues

    group = Group()
    config = EngineConfig(zero_stage=stage, precision=precision, reduction=reduction)
    optimizer = OptimizerConfig(clip_norm=0, betas=(BETA, 0.98), weight_decay=0)
    engine = Engine(trained(dropout, kind), config, optimizer, total_steps=10, device="cpu")
    memory = None
    if with_queue:
        queues = Queues(QueueConfig(rows=11), DIM, group)
        rows = rows_of_worker(stored_rows(), group.rank, group.size, torch.float32)
        queues.enqueue({"documents": (rows.vectors, rows.keys)}, step=0)
        memory = Memory(MomentumEncoder(engine, MomentumConfig(decay=0.9)), queues)
    objective = Sum([OBJECTIVE], group)
    return ContrastiveStep(engine, objective, memory, cached=cached, seed=0, group=group), group


def first_gradients(stage, cached, with_queue, kind="full", reduction="once"):
    """The loss and this worker's share of every gradient: AdamW's first moment after one step is (1-beta) of it."""
    step, group = make_step(stage, cached, with_queue, kind=kind, reduction=reduction)
    mine = share_batch(batch_of(0), group.size, budget_tokens=24)[group.rank]
    metrics = step(mine)
    state = step.engine.state()
    moments = {name: t / (1 - BETA) for name, t in state.items() if name.startswith("exp_avg/")}
    return metrics, moments, state["layout"]


def assembled(answers, kind="full"):
    """{name: flat gradient} from the shares of all workers."""
    parameters = {name: p for name, p in trained(kind=kind).named_parameters() if p.requires_grad}
    whole = {name: torch.full((p.numel(),), torch.nan) for name, p in parameters.items()}
    for _, moments, layout in answers:
        for i, name in enumerate(parameters):
            start, length, _ = layout[i].tolist()
            if length:
                whole[name][start : start + length] = moments[f"exp_avg/{name}"]
    return whole


def check_world(gloo, world_size, stage, cached, with_queue, kind="full", reduction="once"):
    loss, gradients = twin_gradients(batch_of(0), with_queue, kind)
    answers = gloo(world_size, first_gradients, stage, cached, with_queue, kind, reduction)
    assert all(metrics["loss"] == pytest.approx(loss, abs=1e-5) for metrics, _, _ in answers)
    found = assembled(answers, kind)
    assert found.keys() == gradients.keys()
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name].double(), gradient.flatten(), rtol=1e-4, atol=1e-6 * float(norm) + 1e-6)
    assert answers[0][0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


# Every pair of (world size, stage, cached, queue, full or lora) values occurs; and DoRA once.
COVERING = [
    (w + 1, stage, bool((w ^ stage) & 1), bool((w ^ stage) & 2), "lora" if (w >> 1 ^ stage) & 1 else "full")
    for w, stage in itertools.product(range(4), range(4))
]
COVERING.append((2, 3, True, True, "dora"))
EVERY = list(itertools.product((1, 2, 3, 4), (0, 1, 2, 3), (False, True), (False, True), ("full", "lora", "dora")))


def test_every_two_choices_meet_in_what_is_tested():
    axes = (1, 2, 3, 4), (0, 1, 2, 3), (False, True), (False, True), ("full", "lora")
    for i, j in itertools.combinations(range(len(axes)), 2):
        assert set(itertools.product(axes[i], axes[j])) <= {(case[i], case[j]) for case in COVERING}


@pytest.mark.parametrize(("world_size", "stage", "cached", "with_queue", "kind"), COVERING)
def test_loss_and_gradients_equal_the_dense_twin(gloo, world_size, stage, cached, with_queue, kind):
    check_world(gloo, world_size, stage, cached, with_queue, kind)


@pytest.mark.proof
@pytest.mark.parametrize(("world_size", "stage", "cached", "with_queue", "kind"), EVERY)
def test_loss_and_gradients_equal_the_dense_twin_everywhere(gloo, world_size, stage, cached, with_queue, kind):
    check_world(gloo, world_size, stage, cached, with_queue, kind)


@pytest.mark.parametrize(
    ("stage", "cached", "with_queue", "kind"), [(2, False, True, "full"), (3, True, False, "lora")]
)
def test_a_reduction_with_every_chunk_equals_the_dense_twin(gloo, stage, cached, with_queue, kind):
    check_world(gloo, 2, stage, cached, with_queue, kind, "per_chunk")


@pytest.mark.proof
@pytest.mark.parametrize(("world_size", "stage", "cached", "with_queue", "kind"), [e for e in EVERY if e[1] >= 2])
def test_a_reduction_with_every_chunk_equals_the_dense_twin_everywhere(
    gloo, world_size, stage, cached, with_queue, kind
):
    check_world(gloo, world_size, stage, cached, with_queue, kind, "per_chunk")


def run_two_steps(cached, precision, kind):
    step, group = make_step(2, cached, True, precision, dropout=0.3, kind=kind)
    metrics = [step(share_batch(batch_of(t), group.size, 24)[group.rank]) for t in range(2)]
    rows = step.memory.queues.rows(2)["documents"]
    return [m["loss"] for m in metrics], step.engine.state(), rows.vectors, rows.keys.document_ids


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "full"), ("bf16", "full"), ("fp32", "lora")])
def test_caching_draws_the_dropout_of_the_graphs_it_replaces(gloo, precision, kind):
    runs = [gloo(2, run_two_steps, cached, precision, kind) for cached in (False, True)]
    for direct, cached in zip(*runs, strict=True):
        assert direct[0][0] == cached[0][0]
        for name, tensor in direct[1].items():
            if name.startswith("exp_avg/"):
                torch.testing.assert_close(cached[1][name], tensor, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(cached[2], direct[2], rtol=1e-3, atol=1e-4)
        assert torch.equal(cached[3], direct[3])


def queue_after_a_step():
    """What the queue holds after one step, against the encodings of the average that stood when the step began."""
    step, group = make_step(0, False, True)
    mine = share_batch(batch_of(0), group.size, 24)[group.rank]
    ids, mask = (torch.from_numpy(x) for x in mine.documents.padded())
    expected, *_ = step.memory.encoder.forward(inputs=TowerInputs(ids, mask))
    step(mine)
    newest = step.memory.queues.rows(1)["documents"]
    order = newest.numbers.argsort()
    keys = newest.keys[order]
    return newest.vectors[order], keys, expected[-11:], torch.from_numpy(mine.document_ids)[-11:]


def test_the_queue_takes_the_averaged_encodings_of_the_documents(gloo):
    vectors, keys, expected, expected_ids = gloo(1, queue_after_a_step)[0]
    torch.testing.assert_close(vectors, expected)
    assert torch.equal(keys.document_ids, expected_ids)
    assert (keys.query_ids[-5:] == UNKNOWN).all()  # hard negatives answer no query


def messages_of_a_step():
    step, group = make_step(2, True, True)
    step(share_batch(batch_of(0), group.size, 24)[group.rank])
    group.reset_traffic()
    step(share_batch(batch_of(1), group.size, 24)[group.rank])
    return group.messages


def test_a_step_waits_for_the_other_workers_eight_times(gloo):
    """Agreement and sizes, queries and keys, dL/drow; maximum, sums, the loss's totals, the queue's rows; gradients."""
    assert gloo(2, messages_of_a_step) == [{"all_gather": 3, "all_reduce": 4, "reduce_scatter": 1}] * 2


def disagreeing(agreement, chunks):
    """The error of a step whose workers were configured otherwise, or cut their batches otherwise."""
    step, group = make_step(0, False, False)
    batch = share_batch(batch_of(0), group.size, 24)[group.rank]
    step.agreement = agreement * group.rank
    if group.rank == 1 and chunks:
        batch = replace(batch, chunks=batch.chunks[:-1])
    try:
        step(batch)
    except ValueError as error:
        return str(error)


def test_workers_that_disagree_are_told_before_they_wait_for_each_other(gloo):
    assert gloo(2, disagreeing, 0, False) == [None, None]
    told = gloo(2, disagreeing, 7, False)
    assert told == ["the workers disagree about the hash of the configuration: [0, 7], in rank order"] * 2
    for sentence in gloo(2, disagreeing, 0, True):
        assert sentence.startswith("the workers disagree about chunks of batch 0: [")


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


def _held(cached):
    from cluster.worker import tensors_of

    step, group = make_step(2, cached, True)
    batches = [share_batch(batch_of(t), group.size, budget_tokens=24)[group.rank] for t in range(3)]
    step(batches[0])
    held = tensors_of(step)
    before = {name: tensor.clone() for name, tensor in held.items()}
    for batch in batches[1:]:
        step(batch)
    now = tensors_of(step)
    return (
        all(torch.equal(held[name], before[name]) for name in held),
        {name.partition(".")[0] for name in held if not torch.equal(held[name], now[name])},
    )


def test_what_a_checkpoint_writes_is_a_copy_that_later_steps_do_not_change(gloo):
    for unchanged, moved in gloo(2, _held, True):
        assert unchanged
        assert moved == {"engine", "momentum", "queue"}
