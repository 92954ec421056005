"""What lies on disk: committed together or not at all, and whatever happens to a file of it is noticed and named."""

import json

import pytest
import torch

from data_services.schema import RunError
from trainers.checkpoint import (
    MANIFEST,
    STATE,
    check_whole,
    committed,
    described,
    latest,
    newest_whole,
    rank_file,
    reasons_aside,
    set_aside,
    write_manifest,
)
from trainers.collectives import Group
from trainers.config import CheckpointConfig
from trainers.saving import CheckpointStore

FILES = (rank_file(0, 2), rank_file(1, 2), STATE, MANIFEST)


def store(root, group=None, **keys):
    return CheckpointStore(root, CheckpointConfig(asynchronous=False, **keys), group or Group())


def tensors(value):
    return {"w": torch.full((3, 2), float(value)), "moments/exp_avg": torch.arange(4, dtype=torch.bfloat16)}


def of_two_workers(root, steps):
    """Checkpoints of two workers, made by one process as each worker in turn would."""
    own = store(root, keep=9)
    for step in steps:
        own.save(step, tensors(step), {"step": step})
        folder = latest(root).folder
        one = folder / rank_file(0, 1)
        for rank in range(2):
            (folder / rank_file(rank, 2)).write_bytes(one.read_bytes())
        one.unlink()
        write_manifest(folder, step, 0.0, {name: described(folder / name) for name in (STATE, *FILES[:2])})
    return committed(root)


def harm(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    store(tmp_path).save(7, tensors(1), {"plan": {"seed": 3}})
    found = latest(tmp_path)
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
    own.save(2, tensors(2), {})
    (latest(tmp_path).folder / MANIFEST).unlink()
    assert latest(tmp_path).step == 1


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_one_before_is_offered(tmp_path, name, how):
    older, newest = of_two_workers(tmp_path, (5, 10))
    harm(newest.folder / name, how)
    if (name, how) == (MANIFEST, "missing"):  # the commit marker: without it there never was a checkpoint
        assert committed(tmp_path) == [older]
        return
    *_, found = every = committed(tmp_path)
    assert [c.step for c in every] == [5, 10]
    told = rf"{newest.folder} is damaged: {name} .*; the newest whole one is of step 5: .* with --from-step 5"
    with pytest.raises(RunError, match=told):
        check_whole(found, every)
    harm(older.folder / STATE, "flipped")
    with pytest.raises(RunError, match="none of the others is whole: start a new run"):
        check_whole(found, every)


@pytest.mark.parametrize("at", range(0, 300, 7))
def test_any_bit_of_a_manifest_counts(tmp_path, at):
    (found,) = of_two_workers(tmp_path, (5,))
    manifest = found.folder / MANIFEST
    content = bytearray(manifest.read_bytes())
    content[at % len(content)] ^= 1 << at % 8
    manifest.write_bytes(content)
    (again,) = committed(tmp_path)
    assert again.damage().startswith(MANIFEST)
    assert again.step == 5


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{}", '{"format": 2}', '{"format": 2, "step": 5, "checksum": 0}', "\x00" * 50, "[" * 999],
)
def test_what_is_no_manifest_is_damage(tmp_path, content):
    (found,) = of_two_workers(tmp_path, (5,))
    (found.folder / MANIFEST).write_text(content)
    assert committed(tmp_path)[0].damage().startswith(MANIFEST)


def test_another_format_is_told_as_such(tmp_path):
    (found,) = of_two_workers(tmp_path, (5,))
    (found.folder / MANIFEST).write_text(json.dumps({"format": 1, "step": 5, "world_size": 2, "files": {}}))
    assert committed(tmp_path)[0].damage() == "manifest.json is of format 1, this version reads 2"


def test_workers_share_the_verification_of_every_file_whatever_their_number(tmp_path):
    (found,) = of_two_workers(tmp_path, (5,))
    for name in (*FILES[:2], STATE):
        kept = (found.folder / name).read_bytes()
        harm(found.folder / name, "flipped")
        for parts in (1, 2, 3):
            told = [found.damage(part, parts) for part in range(parts)]
            assert any(name in damage for damage in told), (name, parts)
        (found.folder / name).write_bytes(kept)
    assert found.damage() == ""


def test_what_is_set_aside_is_loaded_no_more_and_kept(tmp_path):
    older, newest = of_two_workers(tmp_path, (5, 10))
    set_aside(newest, "a reason")
    assert committed(tmp_path) == [older]
    ((folder, why),) = reasons_aside(tmp_path).items()
    assert why == "a reason"
    store(tmp_path, keep=1).save(15, tensors(1), {})
    assert [c.step for c in committed(tmp_path)] == [15]
    assert (folder / rank_file(1, 2)).is_file()


def _newest_whole(root):
    found = newest_whole(root, Group())
    return found and found.step


@pytest.mark.parametrize("name", FILES)
def test_workers_that_heal_take_the_newest_whole_one_and_say_what_they_left(gloo, tmp_path, name):
    harm(of_two_workers(tmp_path, (5, 10))[-1].folder / name, "truncated")
    assert gloo(2, _newest_whole, tmp_path) == [5, 5]
    ((folder, why),) = reasons_aside(tmp_path).items()
    assert f"is damaged: {name}" in why
    assert folder.is_dir()
    harm(latest(tmp_path).folder / STATE, "missing")
    assert gloo(2, _newest_whole, tmp_path) == [None, None]
    assert len(reasons_aside(tmp_path)) == 2
