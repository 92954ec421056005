"""The built-in corpora by name: their rows, split by split, what their sides are, and what tells that one changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from data_services.fields import Fields


@dataclass(frozen=True)
class BuiltIn:
    """rows    of a split
    stamp   what its rows are a function of, as JSON
    fields  of its rows
    further fields that its rows have besides
    """

    rows: Callable[[str], Iterator[Mapping[str, Any]]]
    stamp: Callable[[], Any]
    fields: Fields
    further: tuple[str, ...] = ()


@cache
def corpora() -> dict[str, BuiltIn]:
    """Every built-in corpus. What draws and sounds is imported when its rows are made."""
    from data_services import builtin
    from data_services.corpora import charts, glyphs, pages, tones

    texts = Fields("query", "positive", id="name")
    images, sounds = (texts._replace(media=(("positive", kind),)) for kind in ("image", "audio"))
    graded = texts._replace(positive_scores="scores", media=(("query", "image"),))
    return {
        builtin.STDLIB_CODE: BuiltIn(builtin.rows, builtin.stdlib_stamp, texts, ("package", "nearby")),
        "glyphs": BuiltIn(glyphs.rows, glyphs.stamp, images, ("category",)),
        "charts": BuiltIn(charts.rows, charts.stamp, graded),
        "pages": BuiltIn(pages.rows, pages.stamp, images),
        "tones": BuiltIn(tones.rows, tones.stamp, sounds),
    }
