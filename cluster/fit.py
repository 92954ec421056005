"""Training on the cluster: Ray Train places the workers, Ray Data executes the plan, the driver follows."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.evidence.watching import scores_of
from cluster.paths import RunPaths
from cluster.prepare import Prepared
from cluster.worker import Task, train_on_worker
from data_services.schema import RunError, UsageError
from trainers.checkpoint import last_copy, latest, reasons_aside
from trainers.fault_log import read_faults
from trainers.hooks import first_line_at
from trainers.stuck import take_stacks

if TYPE_CHECKING:
    from cluster.tracking import Tracker

Progress = Callable[[dict[str, Any]], None]
POLL_S = 0.3
# Ray Train's controller asks every worker how it is so often, and notices a death no sooner; its own choice is 2 s.
HEALTH_CHECK_S = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
MOST_CHECKED_OFTEN = 100  # workers; the controller is one process
# What the signals that ask a run to stop do to any other program.
AT_ONCE: Mapping[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
# Errors that a restart of the workers would meet again. A lost peer or node raises others.
WOULD_FAIL_AGAIN = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RunError, TypeError, ValueError
)  # fmt: skip


class Stopped(RunError):
    """The run was asked to stop; it goes on with a resume."""


@contextmanager
def training(ready: Prepared, tell: Progress) -> Iterator[Callable[[Tracker], float]]:
    """Starts the workers on entering. Gives a function that follows them to the end of the plan and returns the time
    of the first optimizer step seen; the body opens the tracker first, while they start.

    SIGINT and SIGTERM become a request to checkpoint and stop, until the workers have ended. A run that is trained
    already starts nothing.
    """
    run = ready.run
    run.stop_request.unlink(missing_ok=True)
    run.failure.unlink(missing_ok=True)
    with contextlib.ExitStack() as signals:
        stopped = signals.enter_context(stop_on_signal(run, tell))
        fitting = None if is_trained(ready) else Fitting(ready)

        def follow(tracker: Tracker) -> float:
            follower = Follower(run, ready.plan.steps, ready.recipe.data.batch, tracker, tell)
            while fitting and fitting.is_alive():
                fitting.join(POLL_S)
                follower.poll()
            signals.close()
            follower.poll()  # also where the driver died before it had sent the last steps of a trained run
            if fitting:
                check_outcome(fitting.error, ready, bool(stopped))
            tracker.flush()
            return follower.first_step_at

        yield follow


class Fitting(threading.Thread):
    """Ray Train's `fit`, which blocks, in a thread; `error` is what it ended with."""

    def __init__(self, ready: Prepared) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = ray_trainer(ready)
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # noqa: BLE001  handed to the thread that waits
            self.error = error


def is_trained(ready: Prepared) -> bool:
    return ready.run.export.exists() and _at_its_end(ready)


def _at_its_end(ready: Prepared) -> bool:
    """Whether the newest checkpoint is the plan's last, or the one at which no score had been better for long."""
    newest, ended = latest(ready.run.checkpoints), ready.run.ended
    last = json.loads(ended.read_text())["step"] if ended.exists() else ready.plan.steps
    return newest is not None and newest.step == last


def check_outcome(error: BaseException | None, ready: Prepared, stopped: bool) -> None:
    """Raises RunError where the workers failed, or were stopped before the end of the plan."""
    newest = latest(ready.run.checkpoints)
    if error is not None:
        raise run_error(error, ready.run, newest) from error
    if stopped or not _at_its_end(ready):
        at = f"at step {newest.step}" if newest else "before the first checkpoint"
        raise Stopped(f"stopped {at}; go on with: gyre train RECIPE --resume {ready.run.run_id}")


def ray_trainer(ready: Prepared) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from data_services.ray_feed import split_config

    recipe, run = ready.recipe, ready.run
    cluster = recipe.cluster
    if cluster.workers <= MOST_CHECKED_OFTEN:
        os.environ |= {k: v for k, v in HEALTH_CHECK_S.items() if k not in os.environ}
    task = Task(
        recipe=recipe,
        run=run,
        steps=ready.plan.steps,
        lineage=ready.lineage(),
    )

    def dataset() -> Any:
        """Evaluated whenever a group of workers starts."""
        keep_stacks(run)
        if run.failure.exists():
            raise RunError(run.failure.read_text())
        return dataset_of(ready)

    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        ray_worker,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(timeout_s=math.ceil(recipe.faults.timeout_s)),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(run.root),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
        datasets={"plan": dataset},
        dataset_config=split_config(),
    )


def dataset_of(ready: Prepared) -> Any:
    """The run's plan from its newest committed checkpoint on, as a Ray dataset that deals to the workers."""
    from data_services.ray_feed import ray_dataset

    recipe = ready.recipe
    return ray_dataset(
        ready.reader,
        recipe.cluster.workers,
        start_of(ready.run),
        recipe.engine.budget_tokens,
        recipe.data.read_ahead_mib,
    )


def ray_worker(config: Mapping[str, Any]) -> None:
    """The function Ray Train runs on each worker."""
    import ray.train

    from data_services.ray_feed import worker_batches

    task: Task = config["task"]
    rank = ray.train.get_context().get_world_rank()
    try:
        # Before the model is built, so that the first batch is there when it is.
        feed = worker_batches(ray.train.get_dataset_shard("plan"), rank, start_of(task.run), task.steps)
        train_on_worker(task, lambda start: feed)
    except WOULD_FAIL_AGAIN as error:
        with contextlib.suppress(OSError):  # even a full disk takes the empty file, which prevents a restart
            task.run.failure.write_text(f"{error}" if isinstance(error, RunError | UsageError) else f"{error!r}")
        raise


def start_of(run: RunPaths) -> int:
    """The step that a group of workers begins with: of the newest committed checkpoint."""
    newest = latest(run.checkpoints)
    return newest.step if newest else 0


def run_error(error: BaseException, run: RunPaths, newest: Any) -> RunError:
    """The failing worker's own sentence where it left one, else the last line of its traceback."""
    keep_stacks(run)
    with contextlib.suppress(OSError), open(run.failure_log, "a") as log:  # the disk may be what failed
        log.write(f"{error}\n")
    sentence = run.failure.read_text() if run.failure.exists() else ""
    told = (sentence or str(error)).strip().splitlines() or [repr(error)]
    kept = f"the last checkpoint is step {newest.step}" if newest else "there is no checkpoint yet"
    return RunError(
        f"training failed: {told[-1]} ({kept}; tracebacks in {run.failure_log}; go on with: "
        f"gyre train RECIPE --resume {run.run_id})"
    )


def keep_stacks(run: RunPaths) -> None:
    """Takes what stuck workers have left of their stacks into the run's failure.log."""
    if told := take_stacks(run.stacks):
        with contextlib.suppress(OSError), open(run.failure_log, "a") as log:
            log.write(told)


@contextmanager
def stop_on_signal(run: RunPaths, tell: Progress) -> Iterator[list[int]]:
    """SIGINT and SIGTERM ask the workers to checkpoint and stop; a second one ends the process as usual."""
    received: list[int] = []

    def request(number: int, _frame: Any) -> None:
        received.append(number)
        run.stop_request.touch()
        tell({"kind": "note", "text": f"{signal.Signals(number).name}: checkpoint, then stop (again to stop at once)"})
        signal.signal(number, AT_ONCE[number])

    with handling_signals(request):
        yield received


@contextmanager
def stopped_by_signal(sentence: str) -> Iterator[None]:
    """SIGINT and SIGTERM end the body at once as `Stopped(sentence)`; in the main thread only."""

    def stop(number: int, _frame: Any) -> None:
        raise Stopped(f"{signal.Signals(number).name}: {sentence}")

    with handling_signals(stop):
        yield


@contextmanager
def handling_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` meanwhile. In another thread than the main one nothing is changed."""
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in AT_ONCE if main}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class Follower:
    """Reads what rank 0 appends to the metrics file: to the tracker, and to whoever watches."""

    def __init__(self, run: RunPaths, steps: int, batch: int, tracker: Tracker, tell: Progress) -> None:
        self.path, self.steps, self.batch = run.metrics, steps, batch
        self.tracker, self.tell = tracker, tell
        self.first_step_at = time.time()
        self._seen, self._next = 0, tracker.last_step + 1  # the tracker has the steps before
        self._run, self._scored, self._aside = run, set(scores_of(run)), set(reasons_aside(run.checkpoints))
        self._uncopied, _ = last_copy(run.checkpoints)
        self._faults = len(read_faults(run.faults))

    def poll(self) -> None:
        """Takes in the whole lines of steps that are new, and tells scores, checkpoints set aside, failed copies.

        They are found by their step, not by an offset: after a restart rank 0 has cut the file, and may have
        written on past the old offset before this looks again.
        """
        step, failure = last_copy(self._run.checkpoints)
        if failure and step != self._uncopied:
            self._uncopied = step
            self.tell({"kind": "note", "text": f"the checkpoint of step {step} was not copied: {failure}"})
        for folder, why in reasons_aside(self._run.checkpoints).items():
            if folder not in self._aside:
                self._aside.add(folder)
                self.tell({"kind": "note", "text": f"{why}; set aside in {folder}, an older one is taken"})
        for fault in read_faults(self._run.faults)[self._faults :]:
            self._faults += 1
            self.tell({"kind": "note", "text": fault["text"]})
        for step, scores in scores_of(self._run).items():
            if step not in self._scored:
                self._scored.add(step)
                told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
                self.tell({"kind": "note", "text": f"after step {step}: {told}"})
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(first_line_at(file, self._next))
            text = file.read()
        for line in text[: text.rfind(b"\n") + 1].splitlines():
            metrics: dict[str, Any] = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            self._next = metrics["step"] + 1
            self._take(metrics.pop("step"), metrics)

    def _take(self, step: int, metrics: dict[str, float]) -> None:
        if not self._seen:
            self.first_step_at = time.time()
        self._seen += 1
        self.tracker.log(step, metrics)
        self.tell(
            {
                "kind": "step",
                "step": step + 1,
                "steps": self.steps,
                "loss": metrics["loss"],
                "pairs_per_s": metrics["pairs_per_s"],
                "tokens_per_s": metrics["tokens_per_s"],
                "queue_age": metrics.get("queue_age_steps"),
                "eta_s": (self.steps - step - 1) * self.batch / metrics["pairs_per_s"],
            }
        )
