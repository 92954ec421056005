"""Gradients reduced with every chunk are those reduced once, and no whole one outlives its chunk."""

import gc

import pytest
import torch
import torch.distributed as dist

from data_services.schema import UsageError
from tests.trainers.test_engine import make, mine, toy
from trainers.config import EngineConfig
from trainers.reduction import choose_reduction

# Texts of each chunk, on workers with 5 and 3 of them.
CHUNKS = {0: [slice(0, 1), slice(1, 4), slice(4, 5)], 1: [slice(0, 2), slice(2, 3), slice(0, 0)]}
MOMENT = "exp_avg/"


def chunked_step(engine, cached):
    """One step on L = 1/2 sum |h - target|^2; only the first chunk of even steps reaches `rare`."""
    ids, targets = mine()
    chunks = CHUNKS[dist.get_rank()]

    def forward(i):
        return engine.forward(input_ids=ids[chunks[i]], rare=engine.global_steps % 2 == 0 and i == 0)

    kept = [forward(i) for i in range(3)] if not cached else []
    for i, chunk in enumerate(chunks):
        h = forward(i) if cached else kept[i]
        engine.backward([h], [h.detach() - targets[chunk]], last=i == 2)
    return engine.step()


def moments(stage, reduction, precision, cached, offload):
    """Gradient norms and first moments of four steps: a gradient left over would stay in them."""
    engine = make(stage, precision, reduction=reduction, offload=offload)
    norms = [chunked_step(engine, cached).grad_norm for _ in range(4)]
    return norms, {name: t for name, t in engine.state().items() if name.startswith(MOMENT)}


CASES = [
    (2, "fp32", True, "none"),
    (2, "bf16", False, "none"),
    (3, "fp32", False, "none"),
    (3, "bf16", True, "none"),
    (2, "fp32", False, "cpu"),
    (3, "fp32", True, "cpu"),
]


@pytest.mark.parametrize(("stage", "precision", "cached", "offload"), CASES)
def test_both_ways_give_one_gradient(gloo, stage, precision, cached, offload):
    for once, per_chunk in zip(
        *(gloo(2, moments, stage, way, precision, cached, offload) for way in ("once", "per_chunk")), strict=True
    ):
        assert per_chunk[0] == pytest.approx(once[0], rel=1e-5)
        for name, moment in once[1].items():
            # In bf16 the second step's weights may already differ by a rounding of the first's.
            relative = 1e-6 if precision == "fp32" else 1e-3
            torch.testing.assert_close(per_chunk[1][name], moment, rtol=0, atol=relative * float(moment.norm()))


def held_between_chunks(stage, reduction):
    """After a chunk that isn't the last: bytes that it left behind, and how many parameters hold a gradient."""
    engine = make(stage, "fp32", reduction=reduction)
    ids, targets = mine()
    before = live_bytes()
    h = engine.forward(input_ids=ids[:2], rare=True)
    engine.backward([h], [h.detach() - targets[:2]], last=False)
    del h
    with_gradient = [p for p in engine.module.parameters() if p.grad is not None]
    grown = live_bytes() - before
    h = engine.forward(input_ids=ids[2:], rare=True)
    engine.backward([h], [h.detach() - targets[2:]], last=True)
    engine.step()
    return grown, len(with_gradient)


def live_bytes():
    """Of all tensors that Python can reach."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("stage", [2, 3])
def test_no_whole_gradient_outlives_its_chunk(gloo, stage):
    trained = [p for p in toy(0).parameters() if p.requires_grad]
    whole = 4 * sum(p.numel() for p in trained)
    for grown, holding in gloo(2, held_between_chunks, stage, "per_chunk"):
        assert holding == 0
        assert grown < 0.51 * whole  # this worker's share, or less where it was there before
    for grown, holding in gloo(2, held_between_chunks, stage, "once"):
        assert holding == len(trained)
        assert grown > 0.99 * whole


@pytest.mark.parametrize(
    ("stage", "reduction", "elements", "chosen"),
    [
        (2, "auto", 25, "once"),
        (2, "auto", 26, "per_chunk"),
        (3, "auto", 26, "per_chunk"),
        (1, "auto", 26, "once"),
        (0, "auto", 26, "once"),
        (3, "once", 26, "once"),
        (2, "per_chunk", 1, "per_chunk"),
    ],
)
def test_reduction_is_chosen_from_the_bytes_of_whole_gradients(stage, reduction, elements, chosen):
    config = EngineConfig(zero_stage=stage, reduction=reduction, gradient_bytes=100)
    assert choose_reduction(config, elements) == chosen


@pytest.mark.parametrize("stage", [0, 1])
def test_per_chunk_without_sharded_gradients_is_a_usage_error(stage):
    with pytest.raises(UsageError, match=rf"engine\.reduction: per_chunk needs engine\.zero_stage.* it is {stage}"):
        choose_reduction(EngineConfig(zero_stage=stage, reduction="per_chunk"), 1)
