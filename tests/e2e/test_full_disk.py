"""A disk that fills up ends the run with one sentence, and the last good checkpoint is whole."""

import pytest

from tests.e2e.commands import differing, results_in, steps_in
from tests.e2e.disk import fill, small_disk
from tests.e2e.plain import plain_run

FULL_AT = 9  # the checkpoint of step 5 is there, that of step 10 has no room


def _until_the_disk_is_full(task, reader, disk):
    """A worker of a run without Ray; the first fills the disk before step FULL_AT. Returns what it said."""
    import torch.distributed as dist

    from cluster.worker import train_on_worker
    from data_services.schema import RunError
    from data_services.stream import LocalStream

    stream = LocalStream(reader, dist.get_world_size(), dist.get_rank(), task.recipe.engine.budget_tokens)

    def filling(start):
        for batch in stream(start):
            if batch.step == FULL_AT and dist.get_rank() == 0:
                fill(disk)
            yield batch

    try:
        train_on_worker(task, filling)
    except RunError as error:
        return str(error)
    return "nothing"


def test_the_workers_stop_together_and_the_checkpoint_before_is_whole(gloo, recipe, tmp_path):
    from trainers.checkpoint import committed

    with small_disk(tmp_path / "disk", 16) as disk:
        ready, task = plain_run(recipe, disk)
        first, second = gloo(2, _until_the_disk_is_full, task, ready.reader, disk)
        (kept,) = committed(ready.run.checkpoints)
        kept.verify()
        assert kept.step == 5
        assert [p for p in ready.run.checkpoints.glob("step-*") if p != kept.folder] == []
    assert first == second
    assert first.startswith("the checkpoint of step 10 could not be written (worker 0: ")
    assert "No space left on device" in first
    assert first.endswith(f"the last good one is step 5, {kept.folder}")


@pytest.mark.proof
def test_the_command_says_so_and_resumes_when_there_is_room_again(shell, recipe, undisturbed, tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        env = {"GYRE_HOME": str(disk)}
        running = shell.start("train", recipe, env=env, run="mini")
        running.until_step(FULL_AT)
        ballast = fill(disk)
        ended = running.wait()
        assert ended.code == 1, ended
        assert "Traceback" not in ended.err
        *_, sentence = ended.err.splitlines()  # the tracking store warns before: its disk is full, too
        assert "could not be written" in sentence
        assert "No space left on device" in sentence
        assert "the last checkpoint is step" in sentence
        ballast.unlink()
        (metrics,) = disk.glob("mini-*/metrics.jsonl")
        stopped_at = len(steps_in(metrics))
        resumed = shell("train", recipe, "--resume", metrics.parent.name, env=env)
        assert resumed.code == 0, resumed
        assert FULL_AT <= stopped_at < len(steps_in(metrics))
        assert differing(results_in(metrics), undisturbed.results) == {}
