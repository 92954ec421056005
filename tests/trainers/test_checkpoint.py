import errno
import json

import pytest
import torch

from data_services.schema import RunError
from trainers import checkpoint as module
from trainers.checkpoint import MANIFEST, CheckpointStore, committed, latest, rank_file
from trainers.collectives import Group
from trainers.config import CheckpointConfig


def store(root, keep=2):
    return CheckpointStore(root, CheckpointConfig(keep=keep), Group())


def tensors(value):
    return {"w": torch.full((3, 2), float(value)), "moments/exp_avg": torch.arange(4, dtype=torch.bfloat16)}


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    saved = store(tmp_path).save(7, tensors(1), {"plan": {"seed": 3}})
    found = latest(tmp_path)
    assert found == saved
    assert found.step == 7
    assert found.state == {"plan": {"seed": 3}}
    (back,) = found.tensors()
    assert {k: (v.dtype, v.tolist()) for k, v in back.items()} == {
        k: (v.dtype, v.tolist()) for k, v in tensors(1).items()
    }
    assert list(found.tensors("moments/")[0]) == ["exp_avg"]
    found.verify()


def test_a_folder_without_manifest_is_never_loaded(tmp_path):
    own = store(tmp_path)
    own.save(1, tensors(1), {})
    newer = own.save(2, tensors(2), {})
    (newer.folder / MANIFEST).unlink()
    assert latest(tmp_path).step == 1


def test_retention_keeps_the_newest_and_clears_what_was_left_unfinished(tmp_path):
    own = store(tmp_path, keep=2)
    (tmp_path / "step-00000001.dead00").mkdir()
    for step in range(2, 6):
        own.save(step, tensors(step), {})
    assert [c.step for c in committed(tmp_path)] == [4, 5]
    assert len(list(tmp_path.glob("step-*"))) == 2


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    own = store(tmp_path)
    own.save(1, tensors(1), {})

    def full(path, _):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(
        RunError, match=r"step 2 could not be written \(worker 0: No space left.*last good one is step 1"
    ):
        own.save(2, tensors(2), {})
    assert [c.step for c in committed(tmp_path)] == [1]
    assert len(list(tmp_path.glob("step-*"))) == 1
    latest(tmp_path).verify()


def test_an_attempt_that_lost_its_lease_cannot_commit(tmp_path):
    zombie = store(tmp_path)
    zombie.save(1, tensors(1), {})
    successor = store(tmp_path)
    with pytest.raises(RunError, match=f"attempt {successor.attempt} of this run has taken over"):
        zombie.save(2, tensors(2), {})
    assert latest(tmp_path).step == 1
    assert successor.save(2, tensors(2), {}).step == 2


@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_named(tmp_path, harm):
    saved = store(tmp_path).save(3, tensors(1), {})
    path = saved.folder / rank_file(0, 1)
    content = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(RunError, match=r"rank-00000-of-00001\.safetensors"):
        saved.verify()


def _save_on_every_rank(root, fail_on=None):
    import torch.distributed as dist

    rank = dist.get_rank()
    own = CheckpointStore(root, CheckpointConfig(), Group())
    if rank == fail_on:
        module_write = module.write_tensors
        module.write_tensors = lambda path, _: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system"))
        try:
            own.save(5, {"rank": torch.tensor([rank])}, {})
        except RunError as error:
            return str(error)
        finally:
            module.write_tensors = module_write
    try:
        own.save(5, {"rank": torch.tensor([rank])}, {})
    except RunError as error:
        return str(error)
    return ""


def test_two_workers_commit_together_or_not_at_all(gloo, tmp_path):
    assert gloo(2, _save_on_every_rank, tmp_path / "good") == ["", ""]
    found = latest(tmp_path / "good")
    assert [t["rank"].item() for t in found.tensors()] == [0, 1]
    assert set(json.loads((found.folder / MANIFEST).read_text())["files"]) == {
        "state.json",
        rank_file(0, 2),
        rank_file(1, 2),
    }
    sentences = gloo(2, _save_on_every_rank, tmp_path / "bad", 1)
    assert all("worker 1: Read-only file system" in s for s in sentences)
    assert latest(tmp_path / "bad") is None
