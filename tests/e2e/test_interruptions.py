"""What kills a run, or stops it, changes nothing of what it computes; the run itself is in conftest.py."""

import os
import signal
from pathlib import Path

import pytest

from tests.e2e.commands import differing, results_in, steps_in
from tests.e2e.conftest import ASKED_TO_STOP, DRIVER_KILLED, STEPS, WORKER_KILLED


def test_a_killed_worker_is_replaced_by_itself_on_two_nodes(stopped):
    assert len(stopped.workers) == len(set(stopped.nodes)) == 2, "the workers were to be on two nodes"
    assert len(stopped.healed) == 2
    assert stopped.workers[-1] not in stopped.healed


def test_sigterm_is_a_checkpoint_then_exit_1_with_what_to_type_next(stopped, shell):
    ended, run = stopped.ended, shell.run_folder("mini").name
    assert ended.code == 1, ended
    (sentence,) = ended.err.splitlines()
    reached = int(sentence.split("step ")[1].split(";")[0])
    assert ASKED_TO_STOP <= reached < STEPS
    assert sentence == f"gyre: stopped at step {reached}; go on with: gyre train RECIPE --resume {run}"


def test_a_killed_driver_takes_its_cluster_along_and_leaves_the_run(driver_killed):
    assert DRIVER_KILLED <= driver_killed <= STEPS


def test_every_step_computed_the_same_bits_as_without_interruption_and_without_ray(whole, shell, undisturbed):
    broken = results_in(shell.metrics("mini"))
    assert [s["step"] for s in broken] == list(range(STEPS))
    assert differing(broken, undisturbed.results) == {}
    weights = [Path(folder) / "model.safetensors" for folder in (whole[1]["export"], undisturbed.export)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_sigterm_before_training_leaves_no_run(shell, recipe):
    running = shell.start("train", recipe, "name=early", run="early")
    running.until_line("connecting to Ray")
    running.signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 1, ended
    assert ended.err == "gyre: SIGTERM: stopped before training began; the same command begins it\n"
    assert not list(shell.home.glob("*early*"))


@pytest.mark.proof
def test_sigterm_during_evaluation_is_resumed_after_training(shell, recipe):
    running = shell.start("train", recipe, "name=scoring", "data.steps=8", run="scoring")
    running.until_line("evaluating")
    running.signal(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 1, ended
    run = shell.run_folder("scoring").name
    assert ended.err == f"gyre: SIGTERM: stopped after training; go on with: gyre train RECIPE --resume {run}\n"
    resumed = shell("train", recipe, "name=scoring", "data.steps=8", "--resume", run)
    assert resumed.code == 0, resumed


@pytest.mark.proof
def test_ctrl_c_on_a_cluster_in_the_process_is_a_checkpoint_then_exit_1(shell, recipe):
    """A terminal sends SIGINT to the whole process group, what Ray has started there included."""
    from trainers.checkpoint import latest

    running = shell.start("train", recipe, "name=interrupted", run="interrupted")
    running.until_step(WORKER_KILLED)
    os.killpg(running.process.pid, signal.SIGINT)
    ended = running.wait()
    assert ended.code == 1, ended
    reached = len(steps_in(shell.metrics("interrupted")))
    assert WORKER_KILLED <= reached < STEPS
    assert ended.err.startswith(f"gyre: stopped at step {reached}; go on with: ")
    assert latest(shell.run_folder("interrupted") / "checkpoints").step == reached
