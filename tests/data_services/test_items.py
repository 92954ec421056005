"""Items that are no texts: how they stand in a record, what they are known by, and which tower reads them."""

import numpy as np
import pyarrow as pa
import pytest

from data_services.inputs import Routed
from data_services.items import Kinds, Media, item_id, items_of, items_of_sources, text_id
from data_services.ragged import Inputs, Ragged
from data_services.schema import Undecodable

PARTS = {"title": "text", "photo": "image"}


def test_equal_items_have_one_id_whatever_the_order_of_their_parts():
    photo = Media("image", b"png")
    assert item_id("png") == text_id("png") == item_id(photo)  # the same bytes
    assert item_id({"title": "a", "photo": photo}) == item_id({"photo": photo, "title": "a"})
    others = [{"title": "a"}, {"title": "a", "photo": Media("image", b"other")}, {"body": "a", "photo": photo}]
    assert len({item_id(other) for other in [*others, {"title": "a", "photo": photo}]}) == 4


def test_a_stored_column_gives_texts_media_or_the_parts_that_are_there():
    assert items_of(pa.chunked_array([["a", "b"]]), "text") == ["a", "b"]
    assert items_of(pa.chunked_array([[b"a", b"b"]]), "text") == ["a", "b"]
    assert items_of(pa.chunked_array([[b"a"]]), "image") == [Media("image", b"a")]
    rows = [{"title": "a", "photo": b"p"}, {"title": "b", "photo": None}]
    column = pa.chunked_array([pa.array(rows, pa.struct([("title", pa.string()), ("photo", pa.binary())]))])
    assert items_of(column, PARTS) == [{"title": "a", "photo": Media("image", b"p")}, {"title": "b"}]
    mixed = items_of_sources(pa.chunked_array([[b"a", b"b", b"c"]]), ["image", "text"], np.array([1, 0, 1]))
    assert mixed == ["a", Media("image", b"b"), "c"]
    assert Kinds("text", PARTS).modality == "text-image+text"


class Lengths:
    """A reader whose tokens are as many as an item has characters or bytes."""

    def __init__(self, array: str | None) -> None:
        self.array = array

    def __call__(self, items, field, tasks=None):
        sizes = [len(getattr(item, "data", item)) for item in items]
        tokens = Ragged.of([[i] * size for i, size in enumerate(sizes)])
        if self.array is None:
            return tokens
        rows = Ragged(np.array(sizes, np.float32)[:, None], np.arange(len(items) + 1))
        return Inputs(tokens.values, tokens.offsets, {self.array: rows})

    def prompt_tokens(self, field, task=None):
        return 3


def test_items_go_to_the_tower_of_their_kind_or_field_and_come_back_in_order():
    routed = Routed({"text": Lengths(None), "image": Lengths("pixels"), "audio": Lengths("frames")}, "kind")
    items = [Media("image", b"12"), "1", Media("audio", b"123"), Media("image", b"1234")]
    found = routed(items, "document", [0, 1, 2, 3])
    assert found.lengths.tolist() == [2, 1, 3, 4]
    assert found.towers.tolist() == [1, 0, 2, 1]
    assert [found.arrays["pixels"][i].tolist() for i in range(4)] == [[[2.0]], [], [], [[4.0]]]
    assert [len(found.arrays["frames"][i]) for i in range(4)] == [0, 0, 1, 0]
    by_field = Routed({"query": Lengths(None), "document": Lengths(None)}, "field")
    assert by_field(["a", "bb"], "sts-query").towers.tolist() == [0, 0]
    assert by_field(["a"], "document").towers.tolist() == [1]
    assert by_field.prompt_tokens("query") == 3
    with pytest.raises(Undecodable, match="no tower for audio, it has text"):
        Routed({"text": Lengths(None)}, "kind")([Media("audio", b"1")], "query")


def test_arrays_that_one_side_lacks_are_empty_of_it_and_wrong_lengths_are_named():
    texts = Inputs.of_tower(Ragged.of([[1], [2, 3]]), 0)
    pixels = Ragged(np.ones((3, 2, 2), np.uint8), np.array([0, 1, 3]))
    images = Inputs(np.zeros(2, np.int32), np.array([0, 1, 2]), {"pixels": pixels}, np.array([1, 1], np.int8))
    both = Ragged.concat([texts, images])
    assert both.towers.tolist() == [0, 0, 1, 1]
    assert both.arrays["pixels"].lengths.tolist() == [0, 0, 1, 2]
    assert both.take(np.array([3, 0])).arrays["pixels"].values.shape == (2, 2, 2)
    with pytest.raises(ValueError, match="pixels has 2 rows, the tokens are of 1 items"):
        Inputs(np.zeros(1, np.int32), np.array([0, 1]), {"pixels": pixels})
