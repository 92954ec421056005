"""Which fields of a source hold what: named in the recipe, or recognised by the names that known tools give them.

pairs           query, positive [, negatives]
triplets        Sentence Transformers: anchor (or query), positive, negative | negative_1, negative_2, …
tevatron        query, positive_passages, negative_passages of {title, text}; newer: query_text and ids of a corpus
flagembedding   query, pos, neg [, pos_scores, neg_scores, prompt]
beir            a folder of corpus.jsonl, queries.jsonl and qrels/<split>.tsv

The layouts of others as their documentation and loaders have them: Sentence Transformers, "Dataset overview"; Tevatron,
`retriever/dataset.py`; FlagEmbedding, `finetune/embedder`; BEIR, `datasets/data_loader.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from data_services.fields import Fields
from data_services.schema import UsageError

LayoutName = Literal["pairs", "triplets", "tevatron", "flagembedding", "beir"]
_NEGATIVE = re.compile(r"negative(?:_(\d+))?")


class Layout(NamedTuple):
    """A layout and its fields; `id_fields` hold ids of documents in a corpus rather than texts."""

    name: str
    fields: Fields
    id_fields: tuple[str, ...] = ()


def layout_of(present: Sequence[str], named: LayoutName | None, source: str) -> Layout:
    """The layout of rows with such fields; `named` in the recipe, else the one that fits.

    Raises UsageError where none fits, several do, or the named one doesn't.
    """
    fitting = {name: found for name, find in _LAYOUTS.items() if (found := find(present))}
    if named is not None:
        if named not in fitting:
            raise UsageError(
                f"source {source} isn't of format {named}, which has {_NEEDS[named]}; its fields are "
                f"{', '.join(sorted(present))}"
            )
        return fitting[named]
    if len(fitting) > 1 and set(fitting) != {"pairs", "triplets"}:
        raise UsageError(f"source {source} fits several formats: set `format` to {' or '.join(fitting)}")
    if not fitting:
        raise UsageError(
            f"source {source} has fields {', '.join(sorted(present))}, which is no known format: name those of the "
            f"texts as `query` and `positive`"
        )
    return fitting.get("triplets") or next(iter(fitting.values()))


def _pairs(present: Sequence[str]) -> Layout | None:
    if not {"query", "positive"} <= set(present):
        return None
    return Layout("pairs", Fields("query", "positive", ("negatives",) if "negatives" in present else ()))


def _triplets(present: Sequence[str]) -> Layout | None:
    negatives = sorted((n for n in present if _NEGATIVE.fullmatch(n)), key=_rank)
    query = "anchor" if "anchor" in present else "query" if negatives and "query" in present else None
    if query is None or "positive" not in present:
        return None
    return Layout("triplets", Fields(query, "positive", tuple(negatives)))


def _rank(name: str) -> int:
    found = _NEGATIVE.fullmatch(name)
    return int(found[1] or 0) if found else 0


def _tevatron(present: Sequence[str]) -> Layout | None:
    there = set(present)
    row_id = "query_id" if "query_id" in there else None
    query = "query_text" if "query_text" in there else "query"
    if query not in there:
        return None
    for kind in ("passages", "document_ids"):
        if (positive := f"positive_{kind}") in there:
            negatives = tuple(n for n in (f"negative_{kind}",) if n in there)
            ids = (positive, *negatives) if kind == "document_ids" else ()
            return Layout("tevatron", Fields(query, positive, negatives, id=row_id), ids)
    return None


def _flagembedding(present: Sequence[str]) -> Layout | None:
    there = set(present)
    if not {"query", "pos"} <= there:
        return None

    def has(name: str) -> str | None:
        return name if name in there else None

    negatives = ("neg",) if "neg" in there else ()
    of_negatives = has("neg_scores") if negatives else None
    fields = Fields("query", "pos", negatives, has("pos_scores"), of_negatives, prompt=has("prompt"))
    return Layout("flagembedding", fields)


_LAYOUTS = {"pairs": _pairs, "triplets": _triplets, "tevatron": _tevatron, "flagembedding": _flagembedding}
_NEEDS = {
    "pairs": "query and positive",
    "triplets": "anchor (or query), positive and negative or negative_1, negative_2, …",
    "tevatron": "query and positive_passages, or query_text and positive_document_ids",
    "flagembedding": "query and pos",
    "beir": "a folder of corpus.jsonl, queries.jsonl and qrels/<split>.tsv",
}
