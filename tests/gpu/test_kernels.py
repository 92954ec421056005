"""The kernels on a GPU against the dense float64 twin, at sizes that fill the card, and what they hold in memory."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from tests.trainers.objectives.kernel_cases import Case, check
from trainers.objectives import kernels
from trainers.objectives.kernel_pairs import Pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

LARGE = Case(B=777, fresh=1500, stored=9001, D=768, own=333, temperature=0.05, distinct=4000, device="cuda")
CASES = {
    "large": LARGE,
    "few queries, a long queue": replace(LARGE, B=65, own=65, stored=60_000),
    "rows that aren't aligned": replace(LARGE, D=99),
    "ceilings": replace(LARGE, ceilings=True),
    "anchors that move": replace(LARGE, D=64, shortest=1, longest=40),
    "one of each": Case(B=1, fresh=1, stored=1, D=1, own=1, device="cuda"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reductions_and_gradients_equal_the_dense_twin(case, dtype):
    check(replace(case, dtype=dtype))


def test_tf32_is_used_only_where_torch_may():
    fresh, _ = replace(LARGE, stored=0).blocks()
    assert kernels._arguments(fresh, 0)["PRECISION"] == "tf32x3"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert kernels._arguments(fresh, 0)["PRECISION"] == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_same_input_gives_the_same_bits():
    fresh, stored = replace(LARGE, dtype=torch.bfloat16).blocks()
    results = [
        (kernels.forward_block(fresh, columns=333), kernels.forward_block(stored, values=True)) for _ in range(2)
    ]
    for first, second in zip(*results, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True) if a is not None
        )


def test_memory_beside_the_queue_does_not_grow_with_it():
    queries = normalize(torch.randn(2048, 256, device="cuda"), dim=1).bfloat16()
    held = []
    for rows in (200_000, 800_000):
        stored = normalize(torch.randn(rows, 256, device="cuda"), dim=1).bfloat16()
        pairs = Pairs(queries, stored, 0.05)
        kernels.forward_block(pairs, values=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernels.forward_block(pairs, values=True)
        held.append(torch.cuda.max_memory_allocated() - before)
    assert max(held) <= 1.25 * kernels.WEIGHTS_BYTES
    assert held[1] <= 1.05 * held[0]
