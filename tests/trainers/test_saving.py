"""Checkpoints are written beside training, committed by rank 0 once every worker's share is there, or not at all."""

import errno
import json
import threading
import time

import pytest
import torch

from data_services.schema import RunError
from trainers import saving
from trainers.checkpoint import MANIFEST, committed, latest, rank_file
from trainers.collectives import Group
from trainers.config import CheckpointConfig
from trainers.saving import CheckpointStore

PATIENCE_S = 120


def store(root, group=None, **keys):
    return CheckpointStore(root, CheckpointConfig(**keys), group or Group())


def saved(own, step, value=0.0):
    own.save(step, {"w": torch.tensor([value])}, {"step": step})
    own.settle()


def steps_in(root):
    return [c.step for c in committed(root)]


@pytest.fixture
def slow_disk(monkeypatch):
    """An event: writing waits until it is set."""
    let, write = threading.Event(), saving.write_tensors

    def waiting(path, tensors):
        assert let.wait(PATIENCE_S)
        write(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", waiting)
    yield let
    let.set()


def full_disk(path, _):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow_disk):
    own = store(tmp_path)
    own.save(1, {"w": torch.ones(2)}, {})
    assert own.busy == (True, False)
    assert latest(tmp_path) is None
    slow_disk.set()
    own.settle()
    assert not any(own.busy)
    assert steps_in(tmp_path) == [1]


def test_one_that_is_not_asynchronous_is_committed_when_save_returns(tmp_path):
    store(tmp_path, asynchronous=False).save(1, {"w": torch.ones(2)}, {})
    assert steps_in(tmp_path) == [1]


def test_a_second_one_waits_for_the_first(tmp_path, slow_disk):
    own = store(tmp_path)
    own.save(1, {"w": torch.ones(2)}, {})
    threading.Timer(0.2, slow_disk.set).start()
    own.save(2, {"w": torch.ones(2)}, {})
    assert steps_in(tmp_path) == [1]
    own.settle()
    assert steps_in(tmp_path) == [1, 2]


def test_a_step_takes_it_one_stage_further(tmp_path):
    own = store(tmp_path)
    own.save(1, {"w": torch.ones(2)}, {})
    own.advance()  # its share is written: the commit begins
    own.advance()  # its outcome is known
    assert steps_in(tmp_path) == [1]
    own.advance()
    own.settle()


def test_a_full_disk_is_told_at_a_later_step_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    own = store(tmp_path)
    saved(own, 1)
    monkeypatch.setattr(saving, "write_tensors", full_disk)
    own.save(2, {"w": torch.ones(2)}, {})
    told = r"step 2 could not be written \(worker 0: No space left.*last good one is step 1"
    with pytest.raises(RunError, match=told):
        own.advance()
    assert not any(own.busy)
    assert steps_in(tmp_path) == [1]
    assert len(list(tmp_path.glob("step-*"))) == 1
    latest(tmp_path).verify()


def test_a_commit_that_fails_is_told_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    own = store(tmp_path)
    saved(own, 1)

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(saving, "write_manifest", read_only)
    own.save(2, {"w": torch.ones(2)}, {})
    with pytest.raises(RunError, match=r"step 2 could not be written \(worker 0: Read-only file system"):
        own.settle()
    assert steps_in(tmp_path) == [1]


def test_an_attempt_that_lost_its_lease_cannot_commit(tmp_path):
    zombie = store(tmp_path)
    saved(zombie, 1)
    successor = store(tmp_path)
    with pytest.raises(RunError, match=f"attempt {successor.attempt} of this run has taken over"):
        saved(zombie, 2)
    assert steps_in(tmp_path) == [1]
    saved(successor, 2)
    assert steps_in(tmp_path) == [1, 2]


def test_what_was_left_unfinished_is_cleared(tmp_path):
    own = store(tmp_path, keep=2)
    (tmp_path / "step-00000001.dead00").mkdir()
    for step in range(2, 6):
        saved(own, step)
    assert steps_in(tmp_path) == [4, 5]
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_the_only_whole_one_stays_where_newer_ones_are_damaged(tmp_path, monkeypatch):
    own = store(tmp_path, keep=1)
    saved(own, 1)
    write = saving.write_manifest

    def then_torn(folder, *rest):
        write(folder, *rest)
        (folder / rank_file(0, 1)).write_bytes(b"torn")

    monkeypatch.setattr(saving, "write_manifest", then_torn)
    for step in (2, 3):
        saved(own, step)
        assert steps_in(tmp_path) == [1, step]
    monkeypatch.setattr(saving, "write_manifest", write)
    saved(own, 4)
    assert steps_in(tmp_path) == [4]


def _save_while_one_is_slow(root):
    """Rank 1's disk waits for a file that rank 0 makes once its own share is written."""
    own, group = store(root, Group()), Group()
    write = saving.write_tensors

    def waiting(path, tensors):
        while group.rank == 1 and not (root / "go on").exists():
            time.sleep(0.01)
        write(path, tensors)

    saving.write_tensors = waiting
    try:
        own.save(5, {"rank": torch.tensor([group.rank])}, {})
        while group.rank == 0 and any(own.busy):
            time.sleep(0.01)
        before = latest(root)
        if group.rank == 0:
            (root / "go on").touch()
        own.settle()
    finally:
        saving.write_tensors = write
    return before


def test_nothing_is_committed_before_every_share_is_written(gloo, tmp_path):
    assert gloo(2, _save_while_one_is_slow, tmp_path) == [None, None]
    found = latest(tmp_path)
    assert [t["rank"].item() for t in found.tensors()] == [0, 1]
    names = set(json.loads((found.folder / MANIFEST).read_text())["files"])
    assert names == {"state.json", rank_file(0, 2), rank_file(1, 2)}
    found.verify()


def _fail_on_one(root, fail_on):
    own, write = store(root, Group()), saving.write_tensors
    saving.write_tensors = full_disk if own.group.rank == fail_on else write
    try:
        saved(own, 5)
    except RunError as error:
        return str(error)
    finally:
        saving.write_tensors = write
    return ""


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_commit_together_or_not_at_all(gloo, tmp_path, rank):
    sentences = gloo(2, _fail_on_one, tmp_path, rank)
    assert sentences[0] == sentences[1]
    assert f"worker {rank}: No space left on device" in sentences[0]
    assert list(tmp_path.glob("step-*")) == []
