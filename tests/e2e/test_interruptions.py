"""What kills a run, or stops it, changes nothing of what it computes.

One run goes through everything, because every start of Ray costs seconds: across two nodes, a worker is killed and
the command asked to stop; resumed on a cluster of its own, the driver is killed; resumed once more, it ends. What
it computed must then be, bit for bit, what the run that nothing interrupted computed.
"""

import json
import os
import signal

import pytest

from tests.e2e.commands import differing, results_in, steps_in, training_workers
from tests.e2e.conftest import STEPS

# None is a multiple of checkpoint.every_steps: there is always something to replay.
WORKER_KILLED, ASKED_TO_STOP, DRIVER_KILLED = 8, 19, 32
NAME = "broken"


@pytest.fixture(scope="module")
def stopped(shell, recipe, two_nodes):
    """Workers on two nodes; one is killed, later the command gets SIGTERM: (workers, workers after, how it ended)."""
    running = shell.start("train", recipe, f"name={NAME}", "cluster.cpus_per_worker=2", run=NAME, env=two_nodes.env)
    running.until_step(WORKER_KILLED)
    before = training_workers(two_nodes.processes())
    nodes = [worker.ppid() for worker in before]
    before[-1].kill()
    running.until_step(ASKED_TO_STOP)
    after = training_workers(two_nodes.processes())
    running.signal(signal.SIGTERM)
    return (before, nodes), after, running.wait()


@pytest.fixture(scope="module")
def driver_killed(shell, recipe, stopped):
    """The same run, resumed on a cluster in the process until its process group is killed: steps there were then."""
    run = shell.run_folder(NAME).name
    running = shell.start("train", recipe, f"name={NAME}", "--resume", run, run=NAME)
    running.until_step(DRIVER_KILLED)
    running.kill_group()
    return len(steps_in(shell.metrics(NAME)))


@pytest.fixture(scope="module")
def finished(shell, recipe, driver_killed, tmp_path_factory):
    """The same run, resumed by the beginning of its name, to its end: (how the command ended, its JSON)."""
    file = tmp_path_factory.mktemp("json") / "finished.json"
    ended = shell("train", recipe, f"name={NAME}", "--resume", NAME, "--json", file)
    assert ended.code == 0, ended
    return ended, json.loads(file.read_text())


def test_a_killed_worker_is_replaced_by_itself_on_two_nodes(stopped):
    (before, nodes), after, _ = stopped
    assert len(before) == len(set(nodes)) == 2, "the workers were to be on two nodes"
    assert len(after) == 2
    assert before[-1] not in after


def test_sigterm_is_a_checkpoint_then_exit_1_with_what_to_type_next(stopped, shell):
    ended, run = stopped[-1], shell.run_folder(NAME).name
    assert ended.code == 1, ended
    (sentence,) = ended.err.splitlines()
    reached = int(sentence.split("step ")[1].split(";")[0])
    assert ASKED_TO_STOP <= reached < STEPS
    assert sentence == f"gyre: stopped at step {reached}; go on with: gyre train RECIPE --resume {run}"


def test_a_killed_driver_takes_its_cluster_along_and_leaves_the_run(driver_killed):
    assert DRIVER_KILLED <= driver_killed <= STEPS


def test_the_resumed_run_ends_whole(finished, shell, whole):
    _, result = finished
    assert result["run_id"] == shell.run_folder(NAME).name
    assert result["metrics"] == whole[1]["metrics"]
    assert result["model_name"] == NAME


def test_every_step_computed_the_same_bits_as_without_interruption(finished, shell, whole):
    broken, undisturbed = results_in(shell.metrics(NAME)), results_in(shell.metrics("mini"))
    assert [s["step"] for s in broken] == list(range(STEPS))
    assert differing(broken, undisturbed) == {}


def test_replayed_steps_are_in_mlflow_once(finished, shell):
    from cluster.tracking import client

    mlflow = client(shell.home)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name(NAME).experiment_id])
    assert run.info.status == "FINISHED"
    logged = mlflow.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in logged] == [(s["step"], s["loss"]) for s in steps_in(shell.metrics(NAME))]


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
