"""`gyre compare A B`: each side a stored evaluation, or a model, which is evaluated where nobody has yet."""

from __future__ import annotations

from pathlib import Path

from cluster.evidence.baselines import NONE
from cluster.evidence.evaluating import EvaluationJob, Progress, evaluate
from cluster.evidence.suites import open_suite
from cluster.models.folder import fingerprint
from cluster.models.reference import resolve
from cluster.paths import home
from data_services.schema import UsageError
from evaluation import mteb_adapter, stored
from evaluation.compare import Comparison
from evaluation.compare import compare as compare_stored
from evaluation.stored import StoredEvaluation


def compare(
    a: str,
    b: str,
    suite: str | None = None,
    metric: str | None = None,
    root: Path | None = None,
    on_progress: Progress = lambda event: None,
) -> Comparison:
    """b held against a, task by task. Each is a MODEL, or a stored evaluation: its id or folder.

    suite   on which a MODEL is evaluated, if it isn't yet; None beside a stored evaluation: that one's
    metric  in the place of each task's main metric

    Raises UsageError for what isn't there, and for evaluations on suites that differ.
    """
    sides = [_named(name, root) for name in (a, b)]
    there = next((side for side in sides if side is not None), None)
    if suite is not None and None not in sides:
        raise UsageError(f"--suite {suite}: {a} and {b} are stored evaluations, whose suite is known; leave it out")
    if suite is None and there is None:
        raise UsageError(f"{a} and {b} are models: name the suite to compare them on, --suite SUITE")

    def found(name: str) -> StoredEvaluation:
        if suite is not None:
            return evaluation_of(name, suite, root, on_progress)
        assert there is not None
        return _on_suite_of(there, name, root)

    one, other = (side or found(name) for name, side in zip((a, b), sides, strict=True))
    return compare_stored(one, other, metric)


def evaluation_of(
    model: str, suite: str, root: Path | None = None, on_progress: Progress = lambda event: None
) -> StoredEvaluation:
    """The newest evaluation of a MODEL's files on a suite as it is now; made, and stored, where there is none."""
    root = root or home()
    there = stored.find(root, fingerprint(resolve(model, root).folder), _fingerprint(suite, root))
    if there:
        return there[0]
    on_progress({"kind": "phase", "text": f"evaluating {model} on {suite}"})
    return evaluate(EvaluationJob(model, suite, baselines=(NONE,)), root, on_progress)


def _fingerprint(suite: str, root: Path) -> str:
    if suite.startswith(mteb_adapter.PREFIX):
        return mteb_adapter.fingerprint(mteb_adapter.tasks_named(suite.removeprefix(mteb_adapter.PREFIX).split(",")))
    return open_suite(suite, None, None, root).fingerprint


def _on_suite_of(there: StoredEvaluation, model: str, root: Path | None) -> StoredEvaluation:
    ref = resolve(model, root)
    found = stored.find(root or home(), fingerprint(ref.folder), there.result.suite_fingerprint)
    if not found:
        raise UsageError(
            f"{ref.name} has no evaluation on {there.result.suite} as it was for {there.result.id}: "
            f"name the suite with --suite, or gyre evaluate {model}"
        )
    return found[0]


def _named(name: str, root: Path | None) -> StoredEvaluation | None:
    """The stored evaluation of that id or folder, None for anything else."""
    for folder in (Path(name).expanduser(), (root or home()) / stored.FOLDER / name):
        if (folder / "result.json").is_file() and (folder / "per_query.parquet").is_file():
            return stored.read(folder)
    return None
