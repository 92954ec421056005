"""`gyre report`: finds what is named, and writes its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cluster.paths import Ambiguous, find_run, home
from cluster.search.record import find_search
from data_services.schema import RunError, UsageError
from evaluation import stored
from evaluation.compare import Comparison


@dataclass(frozen=True)
class Report:
    """kind: run, search, evaluation or comparison; path: of the page."""

    kind: str
    id: str
    path: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(what: str, out: Path | None = None, root: Path | None = None) -> Report:
    """Writes the page of a run, search, evaluation or comparison: its id, the beginning of a run's or search's, its
    folder, or the file of a comparison.

    out  where; None: beside what it is of

    Raises UsageError for what isn't there, means several, or is damaged; RunError where the disk fails.
    """
    root = root or home()
    found = [made for find in (_run, _search, _evaluation, _comparison) if (made := find(what, root)) is not None]
    if not found:
        raise UsageError(
            f"no run, search, evaluation or comparison {what!r} under {root}; `gyre models` names runs, and every "
            "command that ends says what it left"
        )
    if len(found) > 1:
        raise UsageError(f"{what!r} is ambiguous: {', '.join(f'{made.kind} {made.id}' for made in found)}")
    return found[0].write(out)


@dataclass(frozen=True)
class _Found:
    kind: str
    id: str
    beside: Path
    page: Callable[[], str]

    def write(self, out: Path | None) -> Report:
        path = (out or self.beside).absolute()
        if path.is_dir() or not path.parent.is_dir():
            told = "this is a folder" if path.is_dir() else "no such folder"
            raise UsageError(f"--out {out}: {told}; name a file")
        write_page(path, self.page())
        return Report(self.kind, self.id, str(path))


def write_page(path: Path, html: str) -> None:
    """Whole or not at all. RunError where the disk fails."""
    making = path.with_name(f".{path.name}.making")
    try:
        making.write_text(html, encoding="utf-8")
        making.replace(path)
    except OSError as error:
        making.unlink(missing_ok=True)
        raise RunError(f"the page can't be written to {path}: {error.strerror}") from error


def comparison_file(found: Comparison, root: Path) -> Path:
    return root / stored.COMPARISONS / f"{found.id}.json"


def keep_comparison(found: Comparison, root: Path | None = None) -> Path:
    """Stores it under the home, for `gyre report`."""
    path = comparison_file(found, root or home())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path.parent} can't be made: {error.strerror}") from error
    write_page(path, json.dumps(found.as_dict(), indent=1) + "\n")
    return path


def _run(what: str, root: Path) -> _Found | None:
    run = _one_of(find_run, what, root)
    if run is None:
        return None

    def made() -> str:
        from cluster.reports.evidence import read_run
        from cluster.reports.run import run_page

        return run_page(read_run(run))

    return _Found("run", run.run_id, run.report, made)


def _search(what: str, root: Path) -> _Found | None:
    study = _one_of(find_search, what, root)
    if study is None:
        return None

    def made() -> str:
        from cluster.search.report import search_page
        from cluster.search.results import result_so_far
        from cluster.search.space import Space

        space = Space(study.recipe())
        return search_page(space, result_so_far(study, space.objectives))

    return _Found("search", study.search_id, study.report, made)


def _evaluation(what: str, root: Path) -> _Found | None:
    folders = (Path(what).expanduser(), root / stored.FOLDER / what)
    folder = next((folder for folder in folders if (folder / "per_query.parquet").is_file()), None)
    if folder is None:
        return None
    found = stored.read(folder)

    def made() -> str:
        from cluster.reports.scores import evaluation_page

        return evaluation_page(found)

    return _Found("evaluation", found.result.id, folder / "report.html", made)


def _comparison(what: str, root: Path) -> _Found | None:
    named = Path(what).expanduser()
    path = next((p for p in (named, root / stored.COMPARISONS / f"{what}.json") if p.is_file()), None)
    if path is None:
        return None
    try:
        found = TypeAdapter(Comparison).validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(f"{path} is no comparison; `gyre compare A B --json FILE` writes one") from error

    def made() -> str:
        from cluster.reports.scores import comparison_page

        return comparison_page(found)

    return _Found("comparison", found.id, path.with_suffix(".html"), made)


def _one_of(find: Callable[[str, Path], Any], what: str, root: Path) -> Any:
    """What `find` gives; None where there is none. Ambiguous where several have such an id."""
    try:
        return find(what, root)
    except Ambiguous:
        raise
    except UsageError:
        return None
