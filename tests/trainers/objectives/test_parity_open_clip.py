"""The losses of CLIP and SigLIP as open_clip computes them, written out for one process, and ours on several."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from trainers.collectives import Group
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.embedded import Embedded
from trainers.objectives.keys import Keys
from trainers.objectives.pairwise import Sigmoid
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.objectives.sections.pairwise import SigmoidSection

PAIRS, DIM, CUTS = 7, 6, {1: [7], 2: [4, 3]}
SCALE, BIAS = math.log(1 / 0.07), -10.0  # open_clip's first logit_scale and logit_bias


def features() -> tuple[Tensor, Tensor]:
    """Images and texts, unit vectors float64; some are alike, so that every logit matters."""
    generator = torch.Generator().manual_seed(4)
    images, texts = (torch.randn(PAIRS, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return normalize(images, dim=1), normalize(texts + images, dim=1)


def clip(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Radford et al., arXiv:2103.00020, figure 3: the mean of both cross-entropies over the scaled cosines."""
    logits = logit_scale.exp() * images @ texts.T
    labels = torch.arange(len(images))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def siglip(images: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Zhai et al., arXiv:2303.15343, algorithm 1: every pair by itself, the sum over the number of images."""
    logits = logit_scale.exp() * images @ texts.T + logit_bias
    labels = 2 * torch.eye(len(images), dtype=logits.dtype) - 1
    return -logsigmoid(labels * logits).sum() / len(images)


SECTIONS = {
    clip: (Contrastive, ContrastiveSection.model_validate({"temperature": {"start": 0.07}})),
    siglip: (Sigmoid, SigmoidSection.model_validate({"temperature": {"start": 0.07}, "bias": {"start": BIAS}})),
}
FORMULAS = {formula.__name__: formula for formula in SECTIONS}


def ours(name: str, cuts: list[int], dtype: torch.dtype):
    """On a rank: loss, gradients of its own images and texts, and of what is learned."""
    group = Group()
    kind, section = SECTIONS[FORMULAS[name]]
    loss = kind(section, group)
    mine = slice(sum(cuts[: group.rank]), sum(cuts[: group.rank + 1]))
    images, texts = (side[mine].to(dtype).requires_grad_() for side in features())
    learned = {key: torch.tensor(start, dtype=dtype, requires_grad=True) for key, start in loss.learned.items()}
    keys = Keys(torch.arange(PAIRS)[mine], 10 + torch.arange(PAIRS)[mine])
    owners = torch.arange(len(images))
    share = loss(Embedded(images, texts, keys, keys, owners, PAIRS, learned=learned))
    share.loss.backward()
    return share.metrics["loss"], images.grad, texts.grad, {key: x.grad for key, x in learned.items()}


@pytest.mark.parametrize("world_size", CUTS)
@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_and_its_gradients_equal_open_clips(gloo, name, world_size):
    leaves = [*features(), torch.tensor(SCALE, dtype=torch.float64), torch.tensor(BIAS, dtype=torch.float64)]
    images, texts, scale, bias = (leaf.requires_grad_() for leaf in leaves)
    loss = FORMULAS[name](images, texts, scale, bias)
    loss.backward()
    cuts = CUTS[world_size]
    for dtype, off in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        answers = [ours(name, cuts, dtype)] if world_size == 1 else gloo(world_size, ours, name, cuts, dtype)
        assert [answer[0] for answer in answers] == pytest.approx([float(loss)] * world_size, rel=off)
        found = [torch.cat([answer[side] for answer in answers]).double() for side in (1, 2)]
        torch.testing.assert_close(found[0], images.grad, rtol=10 * off, atol=off)
        torch.testing.assert_close(found[1], texts.grad, rtol=10 * off, atol=off)
        of_scale = sum(answer[3]["log_temperature"] for answer in answers)
        torch.testing.assert_close(of_scale.double(), -scale.grad, rtol=10 * off, atol=off)
        if name == "siglip":
            of_bias = sum(answer[3]["bias"] for answer in answers)
            torch.testing.assert_close(of_bias.double(), bias.grad, rtol=10 * off, atol=off)
