"""Copies of checkpoints in an object store that fails, is slow and loses bytes: none that counts is half of one."""

import pytest
import torch

from data_services.schema import RunError, UsageError
from tests.trainers.stores import object_store
from trainers.checkpoint import MANIFEST, STATE, committed, last_copy, latest, rank_file
from trainers.collectives import Group
from trainers.config import CheckpointConfig
from trainers.copies import CHECKPOINTS, Copies, fetch
from trainers.object_store import ObjectFolder
from trainers.saving import CheckpointStore

SHARE = rank_file(0, 1)


@pytest.fixture
def faulty(monkeypatch):
    with object_store(monkeypatch) as faulty:
        yield faulty


@pytest.fixture
def there(faulty):
    return ObjectFolder("s3://runs/team/some-run", waits_s=(0.0, 0.0), sleep=lambda seconds: None)


@pytest.fixture
def own(tmp_path, there):
    """A run's store of checkpoints; two newest stay."""
    run = tmp_path / "some-run"
    (run / "model").mkdir(parents=True)
    (run / "recipe.json").write_text("{}")
    (run / "model" / "config.json").write_text("{}")
    files = {"recipe.json": run / "recipe.json", "model/config.json": run / "model" / "config.json"}
    copies = Copies(run / "checkpoints", there, Group(), lambda: files)
    return CheckpointStore(run / "checkpoints", CheckpointConfig(keep=2), Group(), copies=copies)


def saved(own, *steps):
    for step in steps:
        own.save(step, {"w": torch.full((1000,), float(step))}, {"step": step})
        own.settle()


def steps_there(there):
    return sorted(name.split("/")[1][5:13] for name in there.sizes() if name.endswith(MANIFEST))


def test_a_machine_that_has_nothing_goes_on_from_the_copy(own, there, tmp_path):
    saved(own, 5, 10, 15)
    assert steps_there(there) == ["00000010", "00000015"]
    fetch(there, tmp_path / "fresh")
    (found,) = committed(tmp_path / "fresh" / CHECKPOINTS)
    assert found.state == {"step": 15}
    assert found.tensors()[0]["w"].tolist() == [15.0] * 1000
    assert (tmp_path / "fresh" / "model" / "config.json").read_text() == "{}"
    fetch(there, tmp_path / "older", step=10)
    assert [c.step for c in committed(tmp_path / "older" / CHECKPOINTS)] == [10]
    with pytest.raises(UsageError, match=r"has no checkpoint of step 5; there are 10, 15"):
        fetch(there, tmp_path / "none", step=5)
    with pytest.raises(UsageError, match="there is no copy of a run at s3://runs/team/other"):
        fetch(ObjectFolder("s3://runs/team/other"), tmp_path / "none")


@pytest.mark.parametrize("how", ["500", "truncated"])
def test_a_fault_that_passes_is_tried_again(own, faulty, there, how):
    faulty.fail(how, times=1, applies=lambda name: SHARE in name)
    saved(own, 5)
    assert faulty.seen == 1
    assert steps_there(there) == ["00000005"]
    assert last_copy(own.root) == (5, "")


# The store's own client tries a 500 again for seven seconds, before each of our tries.
STAYS = [("truncated", name) for name in (SHARE, STATE, "config.json", MANIFEST)] + [
    pytest.param("500", name, marks=[pytest.mark.proof] * (name != SHARE))
    for name in (SHARE, STATE, "config.json", MANIFEST)
]


@pytest.mark.parametrize(("how", "name"), STAYS)
def test_a_fault_that_stays_is_told_and_leaves_the_copy_before(own, faulty, there, tmp_path, how, name):
    saved(own, 5)
    (own.root.parent / "model" / "config.json").write_text('{"changed": 1}')
    faulty.fail(how, applies=lambda path: name in path)
    saved(own, 10)
    step, failure = last_copy(own.root)
    assert step == 10
    assert failure.startswith("worker 0: s3://runs/team/some-run/")
    assert "can't be written, after 3 tries: " in failure
    assert latest(own.root).step == 10, "training goes on with the checkpoint here"
    faulty.heal()
    fetch(there, tmp_path / "fresh")
    assert [c.step for c in committed(tmp_path / "fresh" / CHECKPOINTS)] == [5]
    saved(own, 15)
    assert last_copy(own.root) == (15, "")
    assert steps_there(there)[-1] == "00000015"


def test_a_slow_store_holds_up_neither_steps_nor_checkpoints_and_gets_the_newest(own, faulty, there):
    faulty.fail("slow", applies=lambda name: SHARE in name)
    for step in (5, 10, 15, 20):
        own.save(step, {"w": torch.ones(3)}, {"step": step})
        while own._beside.idle is False:
            own.advance((False, True))
        assert own.busy == (False, True)
    # What is being copied stays here until it is.
    assert [c.step for c in committed(own.root)] == [5, 15, 20]
    faulty.heal()
    own.settle()
    assert steps_there(there) == ["00000005", "00000020"]
    saved(own, 25)
    assert [c.step for c in committed(own.root)] == [20, 25]
    assert steps_there(there) == ["00000020", "00000025"]


def test_a_copy_that_was_damaged_there_is_refused_with_what_else_there_is(own, there, tmp_path):
    saved(own, 5, 10)
    (tmp_path / "torn").write_bytes(b"torn")
    (there / CHECKPOINTS / latest(own.root).folder.name).put(tmp_path / "torn", SHARE)
    told = rf"step 10 at {there.uri} is damaged: {SHARE} has 4 bytes.*--from-step takes another, there are 5"
    with pytest.raises(RunError, match=told):
        fetch(there, tmp_path / "fresh")


def test_an_object_that_would_lie_outside_the_run_is_refused(own, there, tmp_path):
    class Hostile:
        uri = there.uri

        def sizes(self):
            return there.sizes() | {"model/../../../escaped": 4}

    saved(own, 5)
    with pytest.raises(RunError, match=r"escaped', which is no file of a run"):
        fetch(Hostile(), tmp_path / "deep" / "fresh")
    assert not list(tmp_path.rglob("escaped"))
