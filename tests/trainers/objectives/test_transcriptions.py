"""Training steps of published methods, written out plainly for one process, give the weights that ours give on several.

A tower is one linear layer and dropout whose masks belong to the text, so that any split over workers draws the same.
Optimizer: plain gradient descent.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from trainers.collectives import Group
from trainers.config import QueueConfig
from trainers.negative_queue import NegativeQueue
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.embedded import Embedded
from trainers.objectives.keys import Keys
from trainers.objectives.sections.contrastive import ContrastiveSection

TEXTS, INPUTS, DIM, RATE, STEPS = 7, 10, 6, 0.5, 5
CUTS = {1: [7], 2: [4, 3], 3: [2, 5, 0]}  # texts of each worker
CAPACITY, DECAY = 17, 0.8


def batches():
    """STEPS times: texts [n, INPUTS] and the two dropout masks of each [2, n, INPUTS], float64."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        texts = torch.randn(TEXTS, INPUTS, generator=generator, dtype=torch.float64)
        kept = torch.rand(2, TEXTS, INPUTS, generator=generator) > 0.1
        yield texts, kept / 0.9


def start():
    return torch.randn(DIM, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def encode(weight, texts, mask=1.0):
    return normalize((texts * mask) @ weight.T, dim=1)


def simcse(temperature):
    """Gao et al., arXiv:2104.08821, eq. 4: a text's other view against the other views of all texts."""
    weight = start()
    for texts, masks in batches():
        weight.requires_grad_()
        first, second = (encode(weight, texts, mask) for mask in masks)
        similar = first @ second.T / temperature
        loss = cross_entropy(similar, torch.arange(TEXTS))
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = weight.detach() - RATE * gradient
    return weight, loss.item()


def momentum_queue(temperature, keys_of_batch):
    """He et al., arXiv:1911.05722, algorithm 1, with the batch's other keys as negatives beside the queue's. Keys of
    the batch are the momentum encoder's, as there, or online ones, as in ESimCSE (Wu et al., arXiv:2109.04380)."""
    weight, average, queue = start(), start(), torch.zeros(0, DIM, dtype=torch.float64)
    for texts, masks in batches():
        weight.requires_grad_()
        with torch.no_grad():
            new = encode(average, texts)
        queries = encode(weight, texts, masks[0])
        keys = new if keys_of_batch == "momentum" else encode(weight, texts, masks[1])
        similar = queries @ torch.cat([keys, queue]).T / temperature
        loss = cross_entropy(similar, torch.arange(TEXTS))
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = weight.detach() - RATE * gradient
        average = DECAY * average + (1 - DECAY) * weight
        queue = torch.cat([queue, new.float().double()])[-CAPACITY:]
    return weight, loss.item()


def ours(cuts, settings, capacity):
    """On a rank: (weights, loss) of the same run, this worker holding its part of each batch and of the queue."""
    group = Group()
    loss = Contrastive(ContrastiveSection.model_validate({"directions": "query_to_document"} | settings), group)
    queue = NegativeQueue(QueueConfig(rows=capacity), DIM, group)
    weight, average, mine = start(), start(), slice(sum(cuts[: group.rank]), sum(cuts[: group.rank + 1]))
    for step, (texts, masks) in enumerate(batches()):
        ids = torch.arange(TEXTS)[mine] + TEXTS * step
        texts, masks, keys = texts[mine], masks[:, mine], Keys(ids, ids)
        weight.requires_grad_()
        with torch.no_grad():
            new = encode(average, texts)
        rows = queue.rows(step) if capacity else None
        share = loss(
            Embedded(
                queries=encode(weight, texts, masks[0]),
                documents=encode(weight, texts, masks[1]),
                query_keys=keys,
                document_keys=keys,
                owners=torch.arange(len(ids)),
                global_queries=TEXTS,
                momentum_queries=new,
                momentum_documents=new,
                queues={"documents": rows} if rows is not None else {},
            )
        )
        (gradient,) = torch.autograd.grad(share.loss, weight)
        weight = weight.detach() - RATE * group.all_reduce(gradient)
        average = DECAY * average + (1 - DECAY) * weight
        if capacity:
            queue.enqueue(new, keys, step)
    return weight, share.metrics["loss"]


def everywhere(gloo, world_size, *arguments):
    cuts = CUTS[world_size]
    return [ours(cuts, *arguments)] if world_size == 1 else gloo(world_size, ours, cuts, *arguments)


@pytest.mark.parametrize("world_size", CUTS)
def test_simcse(gloo, world_size):
    weight, loss = simcse(temperature=0.05)
    for found in everywhere(gloo, world_size, {"temperature": 0.05}, 0):
        torch.testing.assert_close(found[0], weight, rtol=1e-9, atol=1e-11)
        assert found[1] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("keys_of_batch", ["online", "momentum"])
@pytest.mark.parametrize("world_size", CUTS)
def test_momentum_queue(gloo, world_size, keys_of_batch):
    weight, loss = momentum_queue(0.2, keys_of_batch)
    settings = {"temperature": 0.2, "positive_encoding": keys_of_batch}
    for found in everywhere(gloo, world_size, settings, CAPACITY):
        # the queue's rows and their part of the gradient are float32
        torch.testing.assert_close(found[0], weight, rtol=1e-5, atol=1e-6)
        assert found[1] == pytest.approx(loss, rel=1e-5)
