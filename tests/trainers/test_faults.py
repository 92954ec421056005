"""A step that isn't finite leaves no trace; losses that jump, workers that diverge, lag or stand still are told."""

import itertools
import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_services.collate import share_batch
from data_services.schema import SOURCE_SHIFT, RunError
from tests.trainers.test_step import batch_of, make_step
from trainers.config import FaultsConfig
from trainers.fault_log import FaultLog, read_faults
from trainers.faults import FEWEST, Faults, spike_threshold
from trainers.pace import WorkerPace, slowest
from trainers.replicas import Diverged, bit_sum, check_replicas, replicas_of
from trainers.stuck import StuckWatch, take_stacks

WINDOW = 50
POISONS = ("loss", "gradient", "vector")


def mine(t, group):
    return share_batch(batch_of(t), group.size, 24)[group.rank]


def poison(step, how):
    """What worker 1 does from now on; the others do nothing unusual."""
    if how == "loss":
        of_batch = step.objective

        def infinite(embedded):
            share = of_batch(embedded)
            return replace(share, loss=share.loss + math.inf)  # its gradient is finite

        step.objective = infinite
        return
    encode = step._encode

    def broken(at, index, chunk):
        vectors, *others = encode(at, index, chunk)
        if index == 0 and how == "gradient" and vectors.requires_grad:
            vectors.register_hook(lambda gradient: gradient * math.nan)
        if index == 0 and how == "vector":
            vectors = vectors * torch.ones_like(vectors).index_fill(0, torch.tensor([0]), math.nan)
        return vectors, *others

    step._encode = broken


def everything(step):
    """All that a checkpoint would hold of a worker."""
    return {
        **step.engine.state(),
        **{f"average.{k}": x for k, x in step.memory.encoder.state().items()},
        **{f"queue.{k}": x for k, x in step.memory.queues.state().items()},
    }


def with_and_without(stage, cached, how, precision, kind, reduction):
    """What is different after steps 0, 1 and 2, of which 1 was poisoned, and after 0 and 2."""
    step, group = make_step(stage, cached, True, precision, dropout=0.2, kind=kind, reduction=reduction)
    step(mine(0, group))
    before, (encode, objective) = everything(step), (step._encode, step.objective)
    if group.rank == 1:
        poison(step, how)
    skipped, bad = step(mine(1, group)), step.suspects
    after = everything(step)
    step._encode, step.objective = encode, objective
    last = step(mine(2, group))
    other, _ = make_step(stage, cached, True, precision, dropout=0.2, kind=kind, reduction=reduction)
    other(mine(0, group))
    same_metrics = other(mine(2, group)) == last
    pairs = [(before, after), (everything(step), everything(other))]
    differing = [k for a, b in pairs for k in a | b if not torch.equal(a[k], b[k])]
    return skipped["skipped"], last["skipped"], differing, same_metrics, bad.tolist(), mine(1, group).rows.tolist()


def check_no_trace(gloo, stage, cached, how, precision="fp32", kind="full", reduction="once"):
    for rank, (skipped, last, differing, same_metrics, bad, rows) in enumerate(
        gloo(2, with_and_without, stage, cached, how, precision, kind, reduction)
    ):
        assert (skipped, last, differing, same_metrics) == (1.0, 0.0, [], True)
        assert set(bad) <= set(rows)
        assert bool(bad) == (how == "vector" and rank == 1)


SOME = [
    *((stage, bool(stage & 1), POISONS[stage % 3], "fp32", "full", "once") for stage in range(4)),
    *((stage, not stage & 1, POISONS[(stage + 1) % 3], "bf16", "lora", "once") for stage in range(4)),
    (2, True, "gradient", "fp32", "full", "per_chunk"),
    (3, False, "loss", "bf16", "full", "per_chunk"),
]
ALL = list(itertools.product(range(4), (False, True), POISONS, ("fp32", "bf16"), ("full", "lora"), ("once",)))


@pytest.mark.parametrize(("stage", "cached", "how", "precision", "kind", "reduction"), SOME)
def test_a_skipped_step_leaves_no_trace(gloo, stage, cached, how, precision, kind, reduction):
    check_no_trace(gloo, stage, cached, how, precision, kind, reduction)


@pytest.mark.proof
@pytest.mark.parametrize(("stage", "cached", "how", "precision", "kind", "reduction"), ALL)
def test_a_skipped_step_leaves_no_trace_anywhere(gloo, stage, cached, how, precision, kind, reduction):
    check_no_trace(gloo, stage, cached, how, precision, kind, reduction)


class Normed(torch.nn.Module):
    """With statistics that every forward moves."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.layer(x))


def statistics_after(poisoned):
    from trainers.config import EngineConfig, OptimizerConfig
    from trainers.engine import Engine

    torch.manual_seed(0)
    engine = Engine(Normed(), EngineConfig(zero_stage=2, precision="fp32"), OptimizerConfig(), 10, device="cpu")
    for t in range(3):
        if t == 1 and not poisoned:
            continue
        torch.manual_seed(t)
        engine.train()
        h = engine.forward(x=torch.randn(5, 3))
        engine.backward([h], [torch.full_like(h, math.nan if t == 1 else 1.0)], last=True)
        engine.step()
    return engine.state()


def test_a_skipped_step_leaves_running_statistics_alone(gloo):
    once, other = gloo(1, statistics_after, True)[0], gloo(1, statistics_after, False)[0]
    assert any("running_mean" in name for name in once)
    assert [name for name in once if not torch.equal(once[name], other[name])] == []


def judged(told_by, config, skips):
    """(metrics or error of each step, faults that were told, state) on this worker; `skips`: which steps are."""
    from trainers.collectives import Group

    group, told, found = Group(), [], []
    faults = Faults(config, group, told.append, sources=["docs", "code"])
    for t, skip in enumerate(skips):
        batch = mine(t, group)
        batch = replace(batch, rows=batch.rows | (1 << SOURCE_SHIFT))
        try:
            metrics = {"loss": math.nan if skip else 1.0, "skipped": float(skip)}
            found.append(faults.judge(batch, metrics, batch.rows[:told_by] if group.rank else batch.rows[:0]))
        except RunError as error:
            found.append(str(error))
            break
    return found, told, faults.state()


def test_too_many_skipped_steps_end_the_run_on_every_worker_and_name_the_rows(gloo):
    config = FaultsConfig(skip_in_a_row=1, skip_in_all=3)
    for skips, key in (("0110", "in_a_row allows 1"), ("10101010", "in_all allows 3")):
        answers = gloo(2, judged, 1, config, [int(c) for c in skips])
        (first, told, state), (second, nothing, _) = answers
        assert first == second
        assert key in first[-1]
        assert nothing == []
        rows = sorted(row for row in told[0]["rows"])
        assert rows == sorted(f"code:{row}" for row in range(13))
        assert len(told[0]["suspects"]) == 1
        assert told[0]["suspects"][0] in told[0]["text"]
        assert told[0]["what"] == "loss"
        assert state["skipped"] == skips.count("1") or state["skipped"] == len(told)


def test_by_default_a_few_steps_may_be_skipped():
    found, told, state = judged(0, FaultsConfig(), [0, 1, 1, 0, 1])
    assert found == [{"spike": 0.0}] * 5
    assert (len(told), state["skipped"], state["in_a_row"]) == (3, 3, 1)


@given(st.lists(st.floats(0.5, 2.0), min_size=FEWEST, max_size=60), st.floats(1, 20))
def test_the_spike_threshold_is_above_most_losses_and_moves_with_them(losses, deviations):
    threshold = spike_threshold(losses, deviations)
    assert threshold >= np.median(losses)
    assert spike_threshold([2 * loss for loss in losses], deviations) == pytest.approx(2 * threshold)
    assert spike_threshold(losses[: FEWEST - 1], deviations) == spike_threshold(losses, None) == math.inf


def spikes_of(losses, state=None):
    from trainers.collectives import Group

    faults, batch, group = Faults(FaultsConfig(), Group(), state=state), batch_of(0), Group()
    batch = share_batch(batch, 1, 1000)[group.rank]
    found = [faults.judge(batch, {"loss": x, "skipped": 0.0}, batch.rows[:0])["spike"] for x in losses]
    return found, json.loads(json.dumps(faults.state()))


def test_a_loss_that_jumps_is_a_spike_and_one_that_falls_or_wobbles_is_not():
    random = np.random.default_rng(0)
    falling = list(5 * np.exp(-np.arange(300) / 60) + random.normal(0, 0.02, 300))
    assert sum(spikes_of(falling)[0]) == 0
    jumping = [*falling[:200], 6.0, *falling[200:]]
    assert np.flatnonzero(spikes_of(jumping)[0]).tolist() == [200]


def test_spikes_are_the_same_after_a_resume():
    losses = [1 + 0.1 * math.sin(t) for t in range(60)] + [9.0] + [1.0] * 20
    whole, end = spikes_of(losses)
    first, kept = spikes_of(losses[:45])
    second, resumed_end = spikes_of(losses[45:], kept)
    assert first + second == whole
    assert end == resumed_end
    assert len(end["losses"]) == WINDOW


def compared(stage, kind, with_queue, spoil):
    """What worker 1's changed bit does to a comparison: (the error of each worker, names of what is compared)."""
    step, group = make_step(stage, True, with_queue, "bf16", kind=kind)
    step(mine(0, group))
    held = replicas_of(step)
    check_replicas(held, group)
    if group.rank == 1:
        tensor = held[spoil] if spoil in held else next(t for name, t in held.items() if name.startswith(spoil))
        with torch.no_grad():
            tensor.view(-1)[-1:].add_(1)
    try:
        check_replicas(held, group)
    except Diverged as error:
        return str(error), list(held)
    return "", list(held)


@pytest.mark.parametrize(
    ("stage", "kind", "spoil"),
    [
        (0, "full", "tower.out.weight"),
        (0, "full", "exp_avg_sq"),
        (1, "full", "tower.table.weight"),
        (2, "lora", "the momentum encoder"),
        (3, "full", "tower.norm.weight"),
        (3, "lora", "the momentum encoder"),
        (3, "full", "the numbers of queue documents"),
    ],
)
def test_one_changed_element_is_found_on_every_worker(gloo, stage, kind, spoil):
    (first, held), (second, _) = gloo(2, compared, stage, kind, True, spoil)
    assert first == second
    name = next(name for name in held if name.startswith(spoil))
    assert first == f"every worker holds something else than the others, first {name}"


def voted():
    from trainers.collectives import Group

    group = Group()
    with pytest.raises(Diverged) as told:
        check_replicas({"a": torch.zeros(3), "b": torch.full((2,), float(group.rank == 2))}, group)
    return str(told.value)


def test_of_three_workers_the_one_that_differs_is_named(gloo):
    assert gloo(3, voted) == ["worker 2 holds something else than the others, first b"] * 3


@given(st.integers(1, 40), st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.uint8]), st.data())
def test_any_one_changed_bit_changes_the_sum(length, dtype, data):
    tensor = (torch.arange(length) % 7).to(dtype)
    size = tensor.element_size()
    changed = tensor.clone()
    place, bit = data.draw(st.integers(0, length * size - 1)), data.draw(st.integers(0, 7))
    changed.view(torch.uint8)[place] ^= 1 << bit
    assert bit_sum(tensor) != bit_sum(changed)


def test_a_fault_is_written_once_and_a_line_cut_by_a_kill_is_none(tmp_path):
    path = tmp_path / "faults.jsonl"
    log = FaultLog(path)
    log({"kind": "spike", "step": 3, "text": "it jumped"})
    with open(path, "a") as file:
        file.write('{"kind": "slo')
    assert [fault["text"] for fault in read_faults(path)] == ["it jumped"]
    again = FaultLog(path)
    again({"kind": "spike", "step": 3, "text": "it jumped"})
    again({"kind": "slow", "step": 3, "text": "it lags"})
    assert [fault["kind"] for fault in read_faults(path)] == ["spike", "slow"]


def test_the_slowest_worker_is_compared_with_the_others():
    paces = [WorkerPace(rank, "node", 7, seconds, 0.5) for rank, seconds in enumerate((0.5, 3.5, 0.5))]
    worker, factor = slowest(paces)
    assert (worker.rank, factor) == (1, 4.0)
    assert slowest(paces[:1]) == (paces[0], 1.0)


def stood_still(folder):
    from trainers.collectives import Group

    group, until = Group(), time.monotonic() + 60
    own = folder / f"worker-{group.rank}.txt"
    with StuckWatch(own, timeout_s=0.2):
        group.barrier()  # both files are there
        if group.rank == 1:
            while not all((folder / f"worker-{rank}.txt").stat().st_size for rank in range(2)):
                assert time.monotonic() < until
                time.sleep(0.01)
        group.barrier()
    return own.stat().st_size > 0


def test_workers_that_wait_for_one_that_stands_still_all_leave_their_stacks(gloo, tmp_path):
    assert gloo(2, stood_still, tmp_path) == [True, True]
    told = take_stacks(tmp_path)
    assert told.index("worker-0 was stuck") < told.index("in barrier") < told.index("worker-1 was stuck")
    assert "in stood_still" in told
    assert take_stacks(tmp_path) == ""


def test_a_worker_that_gets_on_leaves_nothing(tmp_path):
    with StuckWatch(tmp_path / "stacks" / "worker.txt", timeout_s=60) as watch:
        watch.beat()
    assert list((tmp_path / "stacks").iterdir()) == []


def time_limits():
    import deepspeed.utils.groups as groups
    import torch.distributed as dist

    make_step(2, False, False)
    one, other = (g._get_backend(torch.device("cpu")) for g in (dist.group.WORLD, groups._WORLD_GROUP))
    return one.options._timeout == other.options._timeout, one is not other


def test_the_engine_waits_no_longer_than_the_default_group(gloo):
    assert gloo(2, time_limits) == [(True, True)] * 2
