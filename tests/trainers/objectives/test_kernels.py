"""The Triton kernels in Triton's interpreter, on a CPU, against the dense float64 twin; tests/gpu has them on a GPU."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.trainers.objectives.kernel_cases import Case, check, check_chunk_by_chunk
from tests.twins import in_type, of_worker, random_rows, random_shares
from trainers.collectives import Group
from trainers.objectives import kernels
from trainers.objectives.blocks import Block
from trainers.objectives.kernel_pairs import Pairs, pairs
from trainers.objectives.keys import Keys
from trainers.objectives.masks import AboveCeiling, OtherClass, SameClass, SameId
from trainers.objectives.reductions import Wanted
from trainers.objectives.sharded_softmax import exchange
from trainers.objectives.similarity import InnerProduct, NegativeSquaredDistance


@pytest.fixture(scope="module")
def interpreted():
    """`interpreted(function, *arguments)` in a process in which Triton was imported as an interpreter."""
    if find_spec("triton") is None:
        pytest.skip("Triton isn't installed (pip install triton)")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int).result()  # the process starts here
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


BASE = Case(B=21, fresh=71, stored=90, D=35, own=9)
CASES = {
    "uneven": BASE,
    "one of each": Case(B=1, fresh=1, stored=1, D=1, own=1),
    "tiles that divide": Case(B=32, fresh=64, stored=128, D=64, own=32),
    "no queries": replace(BASE, B=0, own=0),
    "no fresh candidates": replace(BASE, fresh=0, own=0),
    "no stored candidates": replace(BASE, stored=0),
    "nothing": Case(B=3, fresh=0, stored=0, D=4),
    "opposite": Case(B=9, fresh=2, stored=1, D=1, temperature=0.005),
    "few ids": replace(BASE, distinct=2),
    "ceilings": replace(BASE, ceilings=True),
    "float16": replace(BASE, dtype=torch.float16, ceilings=True),
    "bfloat16": replace(BASE, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reductions_and_gradients_equal_the_dense_twin(interpreted, case):
    interpreted(check_chunk_by_chunk, case)


def test_one_chunk_takes_whatever_fits(interpreted):
    interpreted(check, BASE)


@pytest.mark.parametrize(
    ("shortest", "longest", "dtype"),
    [(1, 400, torch.float32), (400, 1, torch.float32), (300, 300, torch.float32), (1, 400, torch.bfloat16)],
    ids=["growing", "shrinking", "far", "growing, bfloat16"],
)
def test_logits_hundreds_apart_move_the_anchors_and_lose_nothing(interpreted, shortest, longest, dtype):
    case = replace(BASE, own=0, stored=180, dtype=dtype, temperature=0.2, shortest=shortest, longest=longest)
    interpreted(check_chunk_by_chunk, case)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Case,
        B=st.integers(1, 40),
        fresh=st.integers(20, 70),
        stored=st.integers(0, 70),
        D=st.integers(1, 40),
        own=st.integers(0, 1),
        distinct=st.sampled_from([3, 10**6]),
        temperature=st.sampled_from([0.01, 1.0]),
        ceilings=st.booleans(),
        seed=st.integers(0, 99),
    )
)
def test_any_shape_equals_the_dense_twin(interpreted, case):
    interpreted(check_chunk_by_chunk, case)


def _uses() -> list[bool]:
    vectors, score, wanted, masks = torch.zeros(3, 4), InnerProduct(), Wanted(), (SameId(), AboveCeiling())
    return [
        kernels.usable(vectors, score, masks, wanted),
        kernels.usable(vectors.bfloat16(), score, (), wanted),
        kernels.usable(vectors.double(), score, masks, wanted),
        kernels.usable(vectors, NegativeSquaredDistance(), masks, wanted),
        kernels.usable(vectors, score, (SameClass("labels"), OtherClass("tasks")), wanted),
        kernels.usable(vectors, score, masks, Wanted(count=True)),
        kernels.usable(vectors, score, masks, Wanted(scales=(1.0, 2.0))),
        kernels.usable(vectors, score, masks, Wanted(hardest=True)),
    ]


def test_kernels_are_used_where_they_compute_the_same(interpreted):
    assert interpreted(_uses) == [True, True] + 6 * [False]
    assert not kernels.usable(torch.zeros(3, 4), InnerProduct(), (), Wanted()), "on a CPU without the interpreter"


def _relative_errors(rounded: bool = False) -> list[float]:
    """Of the exchange in float32, which the kernels take, to itself in float64, which they don't; with `rounded` the
    kernels' operands are bfloat16, and float64's the same numbers."""
    share, rows = random_shares(2, [(20, 41)], 24, distinct=30)[0], random_rows(3, 50, 24, distinct=30)
    operands = torch.bfloat16 if rounded else torch.float32
    results = []
    for dtype in (torch.float32, torch.float64):
        if rounded and dtype == torch.float64:
            share, rows = in_type(in_type(share, operands), dtype), replace(rows, vectors=rows.vectors.to(operands))
        mine = of_worker(share, {"documents": rows}, 0, 1, dtype)
        stored = mine.queues["documents"]
        temperature = torch.tensor(0.1, dtype=dtype, requires_grad=True)
        fresh = Block(mine.documents, mine.document_keys, (SameId(),), diagonal=True, columns=True)
        queue = Block(stored.vectors, stored.keys, (SameId(),), fresh=False)
        assert kernels.usable(mine.documents, InnerProduct(), fresh.masks, Wanted()) is (dtype == torch.float32)
        found = exchange(
            mine.queries,
            mine.query_keys,
            [fresh, queue],
            temperature=temperature,
            tile=16,
            group=Group(),
            operands=operands,
        )
        row, column = found.rows.denominators, found.columns.denominators
        (row.sum() + column.square().sum()).backward()
        gradients = mine.queries.grad, mine.documents.grad, temperature.grad
        results.append([row, column, found.rows.hardest, found.columns.hardest, found.parts, *gradients])
    return [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]


def test_the_exchange_through_the_kernels_is_the_exchange(interpreted):
    assert max(interpreted(_relative_errors)) < 1e-6


def test_a_run_in_bfloat16_multiplies_sixteen_bits_and_accumulates_in_single_precision(interpreted):
    """Logits of rounded vectors are exact, the weights of the second product are rounded once more."""
    *reduced, of_queries, of_documents, of_temperature = interpreted(_relative_errors, True)
    assert max(reduced) < 1e-6
    assert 1e-5 < max(of_queries, of_documents, of_temperature) < 1e-2


def test_masks_become_ids_and_ceilings():
    def keys(start: int, n: int) -> Keys:
        ids = torch.arange(start, start + n)
        return Keys(ids, ids + 100, labels=ids + 200, ceiling=ids / 10)

    queries, candidates, mine, theirs = torch.zeros(2, 4), torch.zeros(3, 4), keys(0, 2), keys(5, 3)
    masks = SameId(document=False), SameClass("labels"), AboveCeiling()
    made = pairs(queries, mine, candidates, theirs, masks, 0.1)
    assert made.row_ids.tolist() == [[0, 1], [200, 201]]
    assert made.candidate_ids.tolist() == [[5, 6, 7], [205, 206, 207]]
    assert (made.row_ceiling.tolist(), made.column_ceiling.tolist()) == (mine.ceiling.tolist(), theirs.ceiling.tolist())
    plain = pairs(queries, mine, candidates, theirs, (), 0.1)
    assert plain.row_ids is plain.candidate_ids is plain.row_ceiling is plain.column_ceiling is None


def test_shapes_that_disagree_are_named():
    queries, candidates = torch.zeros(3, 4), torch.zeros(5, 4)
    for message, given_ in {
        "4 columns on axis 1, candidates 2": {"candidates": torch.zeros(5, 2)},
        "float64: float32, bfloat16": {"candidates": candidates.double()},
        "row_ids has 4 entries on its last axis, 3 are": {"row_ids": torch.zeros(1, 4, dtype=torch.int64)},
        "candidate_ids has 3 entries on its last axis, 5": {"candidate_ids": torch.zeros(1, 3, dtype=torch.int64)},
        "row_ceiling has 5 entries": {"row_ceiling": torch.zeros(5)},
    }.items():
        with pytest.raises(ValueError, match=message):
            Pairs(**{"queries": queries, "candidates": candidates, "temperature": 1.0, **given_})
    with pytest.raises(ValueError, match="values and 2 columns"):
        kernels.forward_block(Pairs(queries, candidates, 1.0), columns=2, values=True)
    with pytest.raises(ValueError, match="6 columns of 5 candidates"):
        kernels.forward_block(Pairs(queries, candidates, 1.0), columns=6)
