"""Masked tokens: who is chosen, what the head's loss is, and that chunks on any worker add up to one mean."""

from dataclasses import dataclass

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from data_services.schema import UsageError
from trainers.collectives import Group
from trainers.config import EngineConfig, OptimizerConfig
from trainers.engine import Engine
from trainers.objectives.masked_lm import NOTHING, HeadLoss, MaskedLMHead, share_of_head
from trainers.objectives.sections.wrappers import MaskedLM

WORDS, HIDDEN, WIDTH = 50, 8, 6
PAD, CLS, MASK = 0, 2, 3


def head_of(section=None, hidden=HIDDEN):
    """A head with a table of embeddings narrower than the token states, as in ALBERT."""
    torch.manual_seed(0)
    return MaskedLMHead(section or MaskedLM(), nn.Embedding(WORDS, WIDTH), hidden, MASK, (PAD, CLS, MASK)).double()


def texts(rows, length, seed=0):
    """ids [n, L], each row [CLS] and words, and mask [n, L], lengths from 2."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, WORDS, (rows, length), generator=generator)
    ids[:, 0] = CLS
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids * mask, mask


def test_fifteen_in_a_hundred_are_chosen_and_hidden_as_bert_does():
    ids, mask = torch.randint(4, WORDS, (2000, 50)), torch.ones(2000, 50, dtype=torch.int64)
    torch.manual_seed(1)
    altered, targets = head_of().alter(ids, mask)
    chosen = targets != NOTHING
    assert torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(altered[~chosen], ids[~chosen])
    assert chosen.double().mean() == pytest.approx(0.15, abs=0.005)  # 4 standard deviations
    masked, kept = (altered == MASK)[chosen].double().mean(), (altered == ids)[chosen].double().mean()
    assert masked == pytest.approx(0.8 + 0.1 / WORDS, abs=0.014)  # a random token may be the mask token, or the own
    assert kept == pytest.approx(0.1 + 0.1 / WORDS, abs=0.01)
    replaced = altered[chosen & (altered != ids) & (altered != MASK)]
    assert len(replaced.unique()) == WORDS - 1  # any token but MASK, which is told apart above


def test_special_tokens_padding_prompts_and_texts_without_context_stay():
    ids, mask = texts(200, 12)
    ids[150:170, 0] = 7
    ids[150:170, 1:], mask[150:170, 1:] = PAD, 0  # what stands for an empty chunk: one token
    prompt_tokens = torch.tensor([4]).repeat(200)
    prompt_tokens[100:] = 0
    head = head_of(MaskedLM(share=0.99))
    altered, targets = head.alter(ids, mask, prompt_tokens)
    chosen = targets != NOTHING
    assert not chosen[mask == 0].any()
    assert not chosen[ids == CLS].any()
    assert not chosen[:100, :4].any()
    assert not chosen[150:170].any()
    assert chosen[100:, 1:4].any()
    assert chosen[:100, 4:].any()
    assert torch.equal(altered[~chosen], ids[~chosen])


def test_the_same_key_hides_the_same_tokens():
    ids, mask = texts(40, 20)
    first, second, other = (_alter(head_of(), ids, mask, seed) for seed in (5, 5, 6))
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.targets, second.targets)
    assert not torch.equal(first.targets, other.targets)


def _alter(head, ids, mask, seed):
    torch.manual_seed(seed)
    return head.alter(ids, mask)


def test_the_loss_is_the_sum_of_the_chosen_tokens_nats():
    head, states = head_of(), torch.randn(5, 7, HIDDEN, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(4, WORDS, (5, 7)).masked_fill(torch.rand(5, 7) < 0.6, NOTHING)
    total, count = head(states, targets)
    dense, (linear, _, norm) = torch.zeros((), dtype=torch.float64), head.transform
    for row, wanted in zip(states, targets, strict=True):
        for state, word in zip(row, wanted.tolist(), strict=True):
            if word != NOTHING:
                x = linear.weight @ state + linear.bias
                x = x * (1 + torch.erf(x / 2**0.5)) / 2
                x = (x - x.mean()) / (x.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
                logits = head.decoder.weight @ x + head.decoder.bias
                dense = dense - (logits[word] - logits.exp().sum().log())
    assert total.item() == pytest.approx(dense.item(), rel=1e-12)
    assert count == (targets != NOTHING).sum()
    leaves = [states, *head.parameters()]
    both = torch.autograd.grad(total, leaves), torch.autograd.grad(dense, leaves)
    for gradient, expected in zip(*both, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_a_chunk_without_chosen_tokens_runs_through_the_head_all_the_same():
    """At ZeRO-3 every worker must make the same calls; the gradient is one of zeros, not none."""
    head, states = head_of(), torch.randn(2, 3, HIDDEN, dtype=torch.float64, requires_grad=True)
    total, count = head(states, torch.full((2, 3), NOTHING))
    assert (total.item(), int(count)) == (0.0, 0)
    total.backward()
    assert not states.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_the_table_of_embeddings_is_tied_and_counted_once():
    embeddings = nn.Embedding(WORDS, WIDTH)
    module = nn.ModuleDict({"table": embeddings, "head": MaskedLMHead(MaskedLM(), embeddings, HIDDEN, MASK, ())})
    assert module["head"].decoder.weight is embeddings.weight
    names = [name for name, p in module.named_parameters() if p.shape == (WORDS, WIDTH)]
    assert names == ["table.weight"]
    assert not any("special" in name for name in module.state_dict())


class Tower(nn.Module):
    """Embeddings, dropout and one mixing layer: vectors by a mean, and the head beside them, as the module has it."""

    def __init__(self, words=WORDS, hidden=HIDDEN) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(words, hidden)
        self.mix, self.dropout = nn.Linear(2 * hidden, hidden), nn.Dropout(0.2)
        self.head = MaskedLMHead(MaskedLM(share=0.4), self.table, hidden, MASK, (PAD, CLS, MASK))

    def states(self, ids, mask):
        tokens = self.dropout(self.table(ids)) * mask[:, :, None]
        context = (tokens.sum(1) / mask.sum(1, keepdim=True))[:, None].expand_as(tokens)
        return self.mix(torch.cat([tokens, context], 2)).tanh()

    def forward(self, ids, mask):
        vectors = self.states(ids, mask).mean(1)
        altered = self.head.alter(ids, mask)
        return vectors, self.head(self.states(altered.input_ids, mask), altered.targets)


@dataclass(frozen=True)
class Chunk:
    seed: int
    ids: torch.Tensor
    mask: torch.Tensor


def encode(forward, chunk):
    torch.manual_seed(chunk.seed)
    return forward(ids=chunk.ids, mask=chunk.mask)


def chunks_of_workers():
    """Chunks of three workers, as many on each; the second has an empty one."""
    empty = Chunk(3, torch.tensor([[7]]), torch.tensor([[1]]))
    return [
        [Chunk(0, *texts(5, 9, 0)), Chunk(1, *texts(2, 14, 1))],
        [Chunk(2, *texts(4, 6, 2)), empty],
        [Chunk(4, *texts(3, 11, 4)), Chunk(5, *texts(3, 5, 5))],
    ]


def _step(workers, weight):
    """On a rank: the cached step's two passes; (metrics, the gradients that this worker's chunks give)."""
    group, tower = Group(), Tower().double()
    chunks = workers[group.rank]
    with torch.no_grad():
        first = [encode(tower, chunk)[1] for chunk in chunks]
    share = share_of_head(first, weight, group)
    for chunk, seen in zip(chunks, first, strict=True):
        _, (total, _) = encode(tower, chunk)
        assert torch.equal(total, seen[0])  # the second encoding hides the same tokens
        (total * share.gradient).backward()
    return share.metrics, {name: p.grad for name, p in tower.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_chunks_of_all_workers_add_up_to_one_mean(gloo, world_size):
    workers, weight = chunks_of_workers()[:world_size], 0.3
    tower = Tower().double()
    totals, counts = zip(*(encode(tower, chunk)[1] for chunks in workers for chunk in chunks), strict=True)
    count = int(sum(counts))
    dense = weight * sum(totals) / count
    dense.backward()
    ranks = [_step(workers, weight)] if world_size == 1 else gloo(world_size, _step, workers, weight)
    for metrics, _ in ranks:
        assert metrics == pytest.approx({"masked_lm": dense.item() / weight, "masked_tokens": count})
    for name, p in tower.named_parameters():
        torch.testing.assert_close(sum(gradients[name] for _, gradients in ranks), p.grad, rtol=1e-9, atol=1e-12)


def _engine_step(workers, zero_stage):
    """On a rank: the weights after a step of the engine, of rank 0."""
    engine = Engine(
        Tower(words=10007, hidden=11),  # a table too large for ZeRO-3 to keep gathered
        EngineConfig(zero_stage=zero_stage, precision="fp32"),
        OptimizerConfig(lr=1e-2, eps=1e-2),
        total_steps=1,
    )
    engine.train()
    chunks = workers[Group().rank]
    with torch.no_grad():
        share = share_of_head([encode(engine.forward, chunk)[1] for chunk in chunks], 50.0, Group())
    for chunk in chunks:
        vectors, (total, _) = encode(engine.forward, chunk)
        gradients = [torch.ones_like(vectors), torch.full_like(total, share.gradient)]
        engine.backward([vectors, total], gradients, last=chunk is chunks[-1])
    engine.step()
    return engine.full_weights()


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_the_engine_trains_it_on_two_workers_as_on_one(gloo, zero_stage):
    workers = chunks_of_workers()[::2]
    (alone,) = gloo(1, _engine_step, [[chunk for chunks in workers for chunk in chunks]], 0)
    first, _ = gloo(2, _engine_step, workers, zero_stage)
    start = Tower(words=10007, hidden=11).state_dict()
    assert first.keys() == alone.keys()
    for name, weight in alone.items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(first[name], weight, rtol=1e-5, atol=1e-6)


def test_a_batch_without_chosen_tokens_has_no_loss():
    nothing = HeadLoss(torch.zeros(()), torch.zeros((), dtype=torch.int64))
    assert share_of_head([nothing, nothing], 0.5, Group()) == (0.5, {"masked_lm": 0.0, "masked_tokens": 0.0})


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(UsageError, match=r"masked_lm: the model's tokenizer has no mask token"):
        MaskedLMHead(MaskedLM(), nn.Embedding(WORDS, WIDTH), HIDDEN, None, ())


def test_shares_that_pass_one_are_refused():
    with pytest.raises(ValidationError, match=r"masked \(0\.8\) and random \(0\.3\) add up to more than 1"):
        MaskedLM(random=0.3)
