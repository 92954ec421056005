"""A worker that fails ends the others: they are told by its closed connections, not by a time-out."""

import os
import traceback

import pytest
import torch
import torch.multiprocessing as mp

from tests.distributed.pool import free_port
from tests.trainers.test_step import batch_of, make_step

# Far below the half hour that a collective waits by default, far above what a busy machine needs to start.
PATIENCE_S = 120


def broken(encode):
    """Fails in the middle of a step: while it carries the gradient through the second chunk."""

    def instead(step, index, chunk):
        if torch.is_grad_enabled() and index == 1:
            raise LookupError("this worker's encoder is broken")
        return encode(step, index, chunk)

    return instead


def work(rank, port, told):
    """A worker of a launcher that only starts processes: whatever leaves the step ends it."""
    import torch.distributed as dist

    from data_services.collate import share_batch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    step, group = make_step(2, True, False)
    mine = [share_batch(batch_of(t), 2, 24)[rank] for t in range(2)]
    step(mine[0])
    if group.rank == 1:
        step._encode = broken(step._encode)
    try:
        step(mine[1])
    except Exception:
        told.send(traceback.format_exc())
        raise


@pytest.fixture
def ended():
    """(exit code, traceback) of two workers, one of which failed; whichever still runs is killed."""
    context, workers, port = mp.get_context("spawn"), [], free_port()
    for rank in range(2):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(rank, port, there))
        process.start()
        workers.append((process, here))
    for process, _ in workers:
        process.join(PATIENCE_S)
    yield [(process.exitcode, here.recv() if here.poll() else "") for process, here in workers]
    for process, _ in workers:
        process.kill()


def test_a_worker_that_fails_ends_the_others(ended):
    (first_code, first), (second_code, second) = ended
    assert (first_code, second_code) == (1, 1)
    assert "LookupError: this worker's encoder is broken" in second
    assert "Connection closed by peer" in first
    assert "in _reduce" in first
