"""The tasks of a suite with their data: rows read strictly, each fault told with the task, the row and the field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import UsageError
from evaluation.suite import (
    BitextMiningSection,
    ClassificationSection,
    ClusteringSection,
    PairClassificationSection,
    RerankingSection,
    RetrievalSection,
    STSSection,
    TaskSection,
    ZeroShotSection,
    nearest,
)
from evaluation.vectors import Side

if TYPE_CHECKING:
    from data_services.sources import SourceConfig
    from evaluation.tasks.base import Task


def open_task(section: TaskSection, home: Path) -> Task:
    """The task with its texts. Raises UsageError for data that isn't there, is malformed, or can't be scored on."""
    return _OPENERS[type(section)](section, home)


# Data.


def _source(
    section: TaskSection, split: str | None, path: str | list[str] | None = None, **fields: Any
) -> SourceConfig:
    from data_services.sources import SourceConfig

    path = path or section.data
    # Files and lists of files have no splits, and are called train.
    return SourceConfig(path=path, split=split or ("test" if _has_splits(path) else "train"), **fields)


def _has_splits(path: str | list[str]) -> bool:
    return isinstance(path, str) and (":" in path or Path(path).expanduser().is_dir())


class _Rows:
    """Rows of a task's data; each getter gives a column, and names the row that has something else in it."""

    def __init__(self, section: TaskSection, source: SourceConfig, fields: Sequence[str], home: Path) -> None:
        from data_services.judged import read_fields

        self._task, self._rows = section.name, read_fields(source, fields, home)

    def texts(self, field: str) -> list[str]:
        return self._each(field, lambda v: v if isinstance(v, str) and v.strip() else None, "a text")

    def labels(self, field: str) -> list[str]:
        return self._each(field, lambda v: str(v) if isinstance(v, str | int) and str(v).strip() else None, "a label")

    def numbers(self, field: str) -> list[float]:
        return self._each(field, _number, "a number")

    def truths(self, field: str) -> list[bool]:
        truths = {"0": False, "1": True, "False": False, "True": True, "0.0": False, "1.0": True}
        return self._each(field, lambda v: truths.get(str(v)), "0 or 1")

    def lists(self, field: str) -> list[list[str]]:
        def texts(value: Any) -> list[str] | None:
            several = value if isinstance(value, list) else [value]
            return several if several and all(isinstance(v, str) and v.strip() for v in several) else None

        return self._each(field, texts, "a text or a list of texts")

    def _each(self, field: str, read: Callable[[Any], Any], what: str) -> list[Any]:
        found = []
        for number, row in enumerate(self._rows, start=1):
            value = read(row[field])
            if value is None:
                raise UsageError(f"task {self._task}: row {number}: {field} is {str(row[field])[:60]!r}, not {what}")
            found.append(value)
        return found


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number - number == 0 else None


# Kinds.


def _retrieval(section: RetrievalSection, home: Path) -> Task:
    from data_services.judged import read_judged, read_languages
    from evaluation.tasks.ranking import Retrieval

    source = _source(section, section.split, query=section.query, positive=section.positive)
    queries, documents, grades = read_judged(source, home)
    answered = {query for query, judged in grades.items() if any(grade > 0 for grade in judged.values())}
    ids = [query for query in queries if query in answered or section.unanswered == "refuse"]
    at = {document: i for i, document in enumerate(documents)}
    spoken = read_languages(source, section.language, home) if section.language else {}
    return Retrieval(
        section.name,
        section.asked,
        ids,
        [queries[query] for query in ids],
        list(documents),
        list(documents.values()),
        [{at[document]: grade for document, grade in grades[query].items()} for query in ids],
        section.bm25,
        languages=[spoken[text] for query in ids if isinstance(text := queries[query], str)] if spoken else (),
    )


def _reranking(section: RerankingSection, home: Path) -> Task:
    from evaluation.tasks.base import numbered
    from evaluation.tasks.ranking import Reranking

    fields = [section.query, section.positive, section.negatives, *([section.language] if section.language else [])]
    rows = _Rows(section, _source(section, section.split), fields, home)
    languages = rows.labels(section.language) if section.language else ()
    queries = rows.texts(section.query)
    sides = zip(rows.lists(section.positive), rows.lists(section.negatives), strict=True)
    candidates = [dict.fromkeys(wrong, False) | dict.fromkeys(right, True) for right, wrong in sides]
    ids = numbered(len(queries))
    return Reranking(section.name, section.asked, ids, queries, candidates, section.bm25, languages=languages)


def _pairs(
    section: Any, home: Path, *others: str
) -> tuple[_Rows, tuple[str, tuple[str, ...], list[str], list[str], Side]]:
    """The rows with those other fields, and what every task of pairs is made of."""
    rows = _Rows(section, _source(section, section.split), [section.first, section.second, *others], home)
    first, second = rows.texts(section.first), rows.texts(section.second)
    return rows, (section.name, section.asked, first, second, section.side)


def _sts(section: STSSection, home: Path) -> Task:
    from evaluation.tasks.pairs import STS

    rows, pairs = _pairs(section, home, section.score)
    return STS(*pairs, rows.numbers(section.score))


def _pair_classification(section: PairClassificationSection, home: Path) -> Task:
    from evaluation.tasks.pairs import PairClassification

    rows, pairs = _pairs(section, home, section.label)
    return PairClassification(*pairs, rows.truths(section.label))


def _bitext_mining(section: BitextMiningSection, home: Path) -> Task:
    from evaluation.tasks.pairs import BitextMining

    rows, pairs = _pairs(section, home, *([section.language] if section.language else []))
    return BitextMining(*pairs, languages=rows.labels(section.language) if section.language else ())


def _labelled(
    section: Any, source: SourceConfig, home: Path, language: str | None = None
) -> tuple[list[str], list[str], list[str]]:
    """(texts, labels, languages) of the rows that have one of the section's labels."""
    rows = _Rows(section, source, [section.text, section.label, *([language] if language else [])], home)
    labels = rows.labels(section.label)
    spoken = rows.labels(language) if language else [""] * len(labels)
    there = dict.fromkeys(labels)
    missing = next((label for label in section.labels if label not in there), None)
    if missing is not None:
        raise UsageError(f"task {section.name}: {nearest('label', missing, tuple(there)[:50])}")
    whole = zip(rows.texts(section.text), labels, spoken, strict=True)
    kept = [row for row in whole if not section.labels or row[1] in section.labels]
    texts, labels, spoken = ([row[i] for row in kept] for i in range(3))
    return texts, labels, spoken if language else []


def _classification(section: ClassificationSection, home: Path) -> Task:
    from evaluation.tasks.labels import Classification

    texts, labels, spoken = _labelled(section, _source(section, section.split), home, section.language)
    if section.train is None and not _has_splits(section.data):
        raise UsageError(f"task {section.name}: {section.data} has one split; name the data to learn from in `train`")
    train = _source(section, section.train_split or "train", section.train)
    learned, learned_labels, _ = _labelled(section, train, home)
    tried = (section.name, section.asked, texts, labels, section.side)
    return Classification(*tried, learned, learned_labels, section.neighbours, languages=spoken)


def _zero_shot(section: ZeroShotSection, home: Path) -> Task:
    from evaluation.tasks.labels import ZeroShot

    texts, labels, spoken = _labelled(section, _source(section, section.split), home, section.language)
    known = sorted(set(labels))
    if unknown := sorted(set(section.names) - set(known)):
        raise UsageError(f"task {section.name}: names: {nearest('label', unknown[0], tuple(known))}")
    shown = {label: section.template.replace("{}", section.names.get(label, label)) for label in known}
    return ZeroShot(section.name, section.asked, texts, labels, section.side, shown, languages=spoken)


def _clustering(section: ClusteringSection, home: Path) -> Task:
    from evaluation.tasks.labels import Clustering

    texts, labels, _ = _labelled(section, _source(section, section.split), home)
    return Clustering(section.name, section.asked, texts, labels, section.side, section.repeats)


_OPENERS: dict[type[TaskSection], Callable[[Any, Path], Task]] = {
    RetrievalSection: _retrieval,
    RerankingSection: _reranking,
    STSSection: _sts,
    PairClassificationSection: _pair_classification,
    BitextMiningSection: _bitext_mining,
    ClassificationSection: _classification,
    ZeroShotSection: _zero_shot,
    ClusteringSection: _clustering,
}
