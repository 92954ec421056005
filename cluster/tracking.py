"""MLflow as the run's record: one run, written by step in batches, resumable by its id.

The store is SQLite under the home, no server needed; MLFLOW_TRACKING_URI names a team's server instead. The
client is explicit: nothing here depends on, or changes, MLflow's global "active run".
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.config import Recipe, flatten
from cluster.paths import home
from data_services.schema import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient

# Limits of MLflow 3.17's store.
METRICS_PER_BATCH, PARAMS_PER_BATCH, PARAM_CHARS, TAG_CHARS = 900, 100, 6000, 5000
LAST_STEP = "gyre.last_step"

logger = logging.getLogger(__name__)


def tracking_uri(root: Path | None = None) -> str:
    """MLFLOW_TRACKING_URI, else the SQLite store under the home."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root or home()) / 'mlflow.db'}"


def client(root: Path | None = None) -> MlflowClient:
    """A client of the tracking store and the registry. The first one makes the SQLite tables (seconds)."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    # Importing mlflow configures its own loggers, the migration's included, back to INFO.
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback of what it raises as well
    uri = tracking_uri(root)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with store_errors(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Failures of the store as one sentence that says which store."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise RunError(f"the tracking store {_without_password(uri)} {_told(error)}") from error


def _told(error: Exception) -> str:
    """What became of a request to the store."""
    text = str(error).strip()
    if "error code 401" in text or "401 Client Error" in text:
        return "refuses the user or password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if "error code 403" in text or "403 Client Error" in text:
        return "doesn't let this user do that: ask its administrator for the permission"
    if re.search(r"[Tt]imed out|Timeout", text):
        return (
            "doesn't answer in time; nothing is lost, run the same again (MLFLOW_HTTP_REQUEST_TIMEOUT is its patience)"
        )
    if re.search(r"Max retries exceeded|Connection (?:refused|aborted|reset)|RemoteDisconnected", text):
        return "doesn't answer: is it running, and MLFLOW_TRACKING_URI right? Nothing is lost, run the same again"
    return f"failed: {_without_password(text).splitlines()[0] if text else repr(error)}"


def _without_password(text: str) -> str:
    """`text` with the user and password of every URL left out."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def metric_name(name: str) -> str:
    """`ndcg@10` as MLflow accepts it: `ndcg_at_10`."""
    return name.replace("@", "_at_")


class Tracker:
    """One MLflow run. Make it with `start` or `resume`.

    `log` keeps the metrics of a step until `every` steps are there, then sends them in one batch; a step at
    or below `last_step` is not logged again, so a run that replays steps after a restart has each once. Call
    `flush` before a checkpoint is committed: steps before it are never replayed.
    """

    def __init__(self, mlflow_client: MlflowClient, run_id: str, last_step: int = -1, every: int = 10) -> None:
        self.run_id, self.last_step = run_id, last_step
        self._client, self._every = mlflow_client, every
        self._waiting: list[tuple[int, int, Mapping[str, float]]] = []

    @classmethod
    def start(
        cls,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str],
        root: Path | None = None,
        every: int = 10,
    ) -> Tracker:
        """A new run of `experiment`, which is made if it isn't there; artifacts go under mlartifacts/."""
        made = client(root)
        with store_errors(made.tracking_uri):
            found = made.get_experiment_by_name(experiment)
            if found is None:
                local = made.tracking_uri.startswith("sqlite:")
                where = ((root or home()) / "mlartifacts" / experiment).as_uri() if local else None
                experiment_id = made.create_experiment(experiment, artifact_location=where)
            else:
                experiment_id = found.experiment_id
            run = made.create_run(experiment_id, run_name=run_name, tags=_tags(tags))
        return cls(made, run.info.run_id, every=every)

    @classmethod
    def resume(cls, run_id: str, root: Path | None = None, every: int = 10) -> Tracker:
        """The run `run_id` again, marked running. Raises RunError where the store doesn't know it."""
        made = client(root)
        with store_errors(made.tracking_uri):
            made.update_run(run_id, status="RUNNING")
            run = made.get_run(run_id)
            # A kill between a batch's metrics and its tag leaves the tag behind: the loss, always there, tells.
            seen = made.get_metric_history(run_id, "loss") if "loss" in run.data.metrics else []
            last = max([int(run.data.tags.get(LAST_STEP, -1)), *(m.step for m in seen)])
        return cls(made, run_id, last, every)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of `step`, once; values that aren't finite are left out, since the stores disagree on them.

        A store that fails here doesn't stop the training: the steps wait and go with the next batch.
        """
        if step <= self.last_step:
            return
        self.last_step = step
        finite = {metric_name(k): float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._waiting.append((step, int(time.time() * 1000), finite))
        if len(self._waiting) % self._every == 0:
            try:
                self.flush()
            except RunError as error:
                logger.warning("%s; %d steps wait for the next try", error, len(self._waiting))

    def flush(self) -> None:
        """Sends what waits, whole steps at a time, each batch with the number of its last step, for a resume."""
        from mlflow.entities import Metric, RunTag

        while self._waiting:
            taken = 0
            rows: list[Metric] = []
            for step, at, values in self._waiting:
                if rows and len(rows) + len(values) > METRICS_PER_BATCH:
                    break
                rows += [Metric(name, value, at, step) for name, value in values.items()]
                taken += 1
            last = RunTag(LAST_STEP, str(self._waiting[taken - 1][0]))
            with store_errors(self._client.tracking_uri):
                self._client.log_batch(self.run_id, metrics=rows, tags=[last])
            del self._waiting[:taken]

    def log_result(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Figures of the whole run, at its last step, or of the model after another one."""
        from mlflow.entities import Metric

        at, step = int(time.time() * 1000), max(self.last_step, 0) if step is None else step
        rows = [Metric(metric_name(k), float(v), at, step) for k, v in metrics.items() if math.isfinite(v)]
        with store_errors(self._client.tracking_uri):
            self._client.log_batch(self.run_id, metrics=rows)

    def log_params(self, recipe: Recipe) -> None:
        """Every leaf of the recipe as a parameter, `optimizer.lr`; values are cut at the store's limit."""
        self.log_values(dict(flatten(recipe.model_dump(mode="json", exclude={"search"}))))

    def log_values(self, values: Mapping[str, Any]) -> None:
        """Parameters by dotted key; each can be given once."""
        from mlflow.entities import Param

        rows = [Param(key, str(value)[:PARAM_CHARS]) for key, value in values.items()]
        with store_errors(self._client.tracking_uri):
            for begin in range(0, len(rows), PARAMS_PER_BATCH):
                self._client.log_batch(self.run_id, params=rows[begin : begin + PARAMS_PER_BATCH])

    def tag(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(k, v) for k, v in _tags(tags).items()]
        with store_errors(self._client.tracking_uri):
            self._client.log_batch(self.run_id, tags=rows)

    def log_artifacts(self, path: Path, folder: str | None = None) -> None:
        """A file, or all files of a folder, copied to the run's artifacts under `folder`."""
        with store_errors(self._client.tracking_uri):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder)
            else:
                self._client.log_artifact(self.run_id, str(path), folder)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        self.flush()
        with store_errors(self._client.tracking_uri):
            self._client.set_terminated(self.run_id, status)


def _tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value)[:TAG_CHARS] for key, value in tags.items()}
