"""Blocks of rows as records, by whole columns: what `records` does row by row, where no row has a fault.

    raw table      the fields as they were read            `clean` ->
    record table   `Column` without ids of texts           `with_ids` ->
    stored table   `SCHEMA`, what the store keeps

Whatever `clean` isn't sure about it gives back as None, and `records` decides row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_services.draws import mix
from data_services.fields import Fields
from data_services.items import TEXT, Form, Kinds, Media, item_id
from data_services.records import Record, Stored
from data_services.schema import UNKNOWN, Column, class_id


def schema_of(kinds: Kinds) -> pa.Schema:
    """Columns of a stored source whose sides are of these kinds."""
    query, document = _item_type(kinds.query), _item_type(kinds.document)
    return pa.schema(
        [
            (Column.ID, pa.string()),
            (Column.QUERY, query),
            (Column.POSITIVES, pa.list_(document)),
            (Column.NEGATIVES, pa.list_(document)),
            (Column.QUERY_ID, pa.int64()),
            (Column.POSITIVE_IDS, pa.list_(pa.int64())),
            (Column.NEGATIVE_IDS, pa.list_(pa.int64())),
            (Column.POSITIVE_SCORES, pa.list_(pa.float32())),
            (Column.NEGATIVE_SCORES, pa.list_(pa.float32())),
            (Column.WEIGHT, pa.float32()),
            (Column.FREQUENCY, pa.float32()),
            *((name, pa.int64()) for name in Column.CLASSES),
        ]
    )


def _item_type(form: Form) -> pa.DataType:
    if isinstance(form, str):
        return pa.string() if form == "text" else pa.binary()
    return pa.struct([(name, _item_type(kind)) for name, kind in form.items()])


SCHEMA = schema_of(TEXT)
_IDS = {Column.QUERY_ID, Column.POSITIVE_IDS, Column.NEGATIVE_IDS}
_ITEMS = {Column.QUERY, Column.POSITIVES, Column.NEGATIVES}  # which their ids stand for
RECORD_SCHEMA = pa.schema([field for field in SCHEMA if field.name not in _IDS])
_LARGEST_FLOAT32 = 3.4028234e38
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class _Unsure(Exception):
    """A row of the block needs a closer look."""


def record_table(records: Sequence[Record], kinds: Kinds = TEXT) -> pa.Table:
    """Records of the row-by-row way as a record table."""
    schema = pa.schema([field for field in schema_of(kinds) if field.name not in _IDS])
    return pa.Table.from_pydict(
        {
            field.name: pa.array(
                [getattr(record, _ATTRIBUTES.get(field.name, field.name)) for record in records], field.type
            )
            for field in schema
        },
        schema=schema,
    )


_ATTRIBUTES = {Column.ID: "id", Column.QUERY: "query"}


def clean(raw: pa.Table, fields: Fields, max_bytes: int) -> pa.Table | None:
    """The record table of a block, as `records.record` makes it of the rows; None where one may be malformed.

    Images, sounds and items of parts go row by row: each has to be decoded anyway.
    """
    row_by_row = fields.relations is not None or fields.title is not None or fields.kinds != TEXT
    if row_by_row or not set(fields.named) <= set(raw.column_names):
        return None
    try:
        table = _clean(raw.combine_chunks(), fields)
        _check_sizes(table, max_bytes)
    except (_Unsure, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    return table


def _clean(raw: pa.Table, fields: Fields) -> pa.Table:
    n = len(raw)

    def column(field: str) -> pa.Array:
        return pa.array([], raw.schema.field(field).type) if n == 0 else raw.column(field).chunk(0)

    query = _texts(column(fields.query))
    if fields.prompt is not None:
        prompt = _plain(column(fields.prompt)).fill_null("")
        query = pc.binary_join_element_wise(prompt, query, "")
    positives = _lists(column(fields.positive))
    _sure(n == 0 or pc.min(pc.list_value_length(positives)).as_py() >= 1)
    negatives = _several([column(field) for field in fields.negatives], n)
    none = {name: pa.nulls(n, RECORD_SCHEMA.field(name).type) for name in RECORD_SCHEMA.names}
    made = none | {Column.QUERY: query, Column.POSITIVES: positives, Column.NEGATIVES: negatives}
    if fields.id is not None:
        made[Column.ID] = _names(column(fields.id))
    for name, texts in ((Column.POSITIVE_SCORES, positives), (Column.NEGATIVE_SCORES, negatives)):
        if (field := getattr(fields, name)) is not None:
            made[name] = _scores(column(field), texts)
    if fields.weight is not None:
        made[Column.WEIGHT] = _weights(column(fields.weight))
    if fields.frequency is not None:
        made[Column.FREQUENCY] = frequencies = _weights(column(fields.frequency))
        _sure(bool((frequencies.to_numpy() > 0).all()))
    for name in Column.CLASSES:
        field = getattr(fields, name)
        if field is not None:
            constant = pa.array(np.full(n, class_id(field[1:]))) if field.startswith("=") else None
            made[name] = constant if constant is not None else _classes(column(field))
    return pa.Table.from_pydict(made, schema=RECORD_SCHEMA)


def _sure(condition: bool) -> None:
    if not condition:
        raise _Unsure


def _plain(column: pa.Array) -> pa.Array:
    """Texts, null or blank ones among them."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    _sure(_is_text(column.type))
    column = column.cast(pa.string())
    column.validate(full=True)  # as UTF-8
    return column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _texts(column: pa.Array) -> pa.Array:
    """Texts without null or blank ones; of passages (structs) their title and text."""
    if pa.types.is_struct(column.type):
        return _passages(column)
    column = _plain(column)
    _sure(column.null_count == 0 and all(map(str.strip, column.to_pylist())))
    return column


def _passages(column: pa.Array) -> pa.Array:
    names = column.type.names
    _sure("text" in names and column.null_count == 0)
    text = _texts(pc.struct_field(column, "text"))
    if "title" not in names or pa.types.is_null(column.type.field("title").type):
        return text
    title = _plain(pc.struct_field(column, "title")).fill_null("")
    return pc.if_else(pc.equal(title, ""), text, pc.binary_join_element_wise(title, text, " "))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _lists(column: pa.Array, missing: bool = False) -> pa.ListArray:
    """Lists of texts; a text is a list of one. missing: a null is an empty list, else it is a fault."""
    _sure(missing or column.null_count == 0)
    if pa.types.is_null(column.type):
        return _empty_lists(len(column))
    if not _is_list(column.type):
        return _list_array(
            column.is_valid().to_numpy(zero_copy_only=False).astype(np.int64), _texts(column.drop_null())
        )
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = pc.list_flatten(column)
    return _empty_lists(len(column)) if pa.types.is_null(values.type) else _list_array(lengths, _texts(values))


def _list_array(lengths: np.ndarray, values: pa.Array) -> pa.ListArray:
    """Lists of such lengths [n], their values end to end."""
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), values)


def _empty_lists(n: int) -> pa.ListArray:
    return _list_array(np.zeros(n, np.int64), pa.array([], pa.string()))


def _several(columns: Sequence[pa.Array], n: int) -> pa.ListArray:
    """The texts of several columns, row by row, in the order of the columns."""
    lists = [_lists(column, missing=True) for column in columns]
    if not lists:
        return _empty_lists(n)
    if len(lists) == 1:
        return lists[0]
    lengths = np.stack([pc.list_value_length(part).to_numpy() for part in lists]).astype(np.int64)  # [fields, n]
    # Where each list begins in the values end to end, taken in the order (row, field).
    starts = np.cumsum(lengths.ravel()) - lengths.ravel()
    by_row, starts = lengths.T.ravel(), starts.reshape(lengths.shape).T.ravel()
    within = np.arange(by_row.sum()) - np.repeat(np.cumsum(by_row) - by_row, by_row)
    values = pa.concat_arrays([part.flatten() for part in lists]).take(pa.array(np.repeat(starts, by_row) + within))
    return _list_array(lengths.sum(axis=0), values)


def _numbers(column: pa.Array) -> pa.Array:
    """float32 of numbers, all finite in 32 bits."""
    _sure(pa.types.is_integer(column.type) or pa.types.is_floating(column.type))
    _sure(column.null_count == 0)
    wide = column.cast(pa.float64(), safe=False)
    _sure(bool((np.abs(wide.to_numpy(zero_copy_only=False)) <= _LARGEST_FLOAT32).all()))
    return wide.cast(pa.float32(), safe=False)


def _scores(column: pa.Array, texts: pa.ListArray) -> pa.ListArray:
    """A number, or a list of them, for each text of each row."""
    wanted = pc.list_value_length(texts).to_numpy().astype(np.int64)
    if pa.types.is_null(column.type):
        values, lengths = pa.array([], pa.float32()), np.zeros(len(column), np.int64)
    elif _is_list(column.type):
        values = pc.list_flatten(column)
        values = pa.array([], pa.float32()) if pa.types.is_null(values.type) else _numbers(values)
        lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    else:
        values = _numbers(column.drop_null())
        lengths = column.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
    _sure(bool((lengths == wanted).all()))
    return _list_array(lengths, values)


def _weights(column: pa.Array) -> pa.Array:
    weights = _numbers(column)
    _sure(bool((weights.to_numpy() >= 0).all()))
    return weights


def _classes(column: pa.Array) -> pa.Array:
    if pa.types.is_null(column.type):
        return pa.array(np.full(len(column), UNKNOWN))
    if pa.types.is_signed_integer(column.type):
        wide = column.cast(pa.int64())
        _sure(not (wide.drop_null().to_numpy(zero_copy_only=False) == UNKNOWN).any())
        return wide.fill_null(UNKNOWN)
    names = _plain(column).dictionary_encode()
    ids = pa.array([class_id(name) for name in _texts(names.dictionary).to_pylist()], pa.int64())
    return ids.take(names.indices).fill_null(UNKNOWN)


def _names(column: pa.Array) -> pa.Array:
    """Ids of rows: texts, or whole numbers as texts."""
    if pa.types.is_integer(column.type):
        _sure(column.null_count == 0)
        return column.cast(pa.string())
    _sure(not pa.types.is_struct(column.type))
    return _texts(column)


def _check_sizes(table: pa.Table, max_bytes: int) -> None:
    sizes = np.zeros(len(table), np.int64)
    sizes += pc.binary_length(table[Column.QUERY]).to_numpy()
    for name in (Column.POSITIVES, Column.NEGATIVES):
        lengths = pc.list_value_length(table[name]).to_numpy().astype(np.int64)
        ends = np.concatenate(
            [[0], np.cumsum(pc.binary_length(pc.list_flatten(table[name])).to_numpy(), dtype=np.int64)]
        )
        stops = np.cumsum(lengths)
        sizes += ends[stops] - ends[stops - lengths]
    _sure(not len(sizes) or int(sizes.max()) <= max_bytes)


# Ids and fingerprints.


def with_ids(table: pa.Table) -> pa.Table:
    """A record table as a stored one, with the ids of its texts, and its own where it has none.

    The id of a row that brings none is 32 hex digits: the id of its query, and a hash of those of its positives. It
    stays when the row moves to another file, when its negatives are mined anew or it is scored again, and the
    triplets of one pair share it.
    """
    queries = _ids_of(table[Column.QUERY])
    positives, negatives = (_ids_of_lists(table[name]) for name in (Column.POSITIVES, Column.NEGATIVES))
    made = {name: table[name] for name in table.column_names}
    made |= {
        Column.QUERY_ID: pa.array(queries),
        Column.POSITIVE_IDS: positives,
        Column.NEGATIVE_IDS: negatives,
    }
    if table[Column.ID].null_count:
        made[Column.ID] = _row_ids(queries, positives)
    schema = pa.schema([table.schema.field(f.name) if f.name in table.schema.names else f for f in SCHEMA])
    return pa.Table.from_pydict(made, schema=schema)


def _ids_of(items: pa.ChunkedArray) -> np.ndarray:
    """[n] int64, `item_id` of each stored item."""
    if pa.types.is_string(items.type):
        return text_ids(items.to_pylist())
    return np.array([item_id(_as_item(stored)) for stored in items.to_pylist()], np.int64)


def _as_item(stored: Stored) -> str | Media | dict[str, str | Media]:
    """A stored item for `item_id`, to which images and sounds are bytes alike."""
    if isinstance(stored, dict):
        return {name: _part(part) for name, part in stored.items() if part is not None}
    return _part(stored)


def _part(stored: str | bytes) -> str | Media:
    return stored if isinstance(stored, str) else Media("image", stored)


def text_ids(texts: Iterable[str]) -> np.ndarray:
    """[n] int64, `text_id` of each."""
    blake = hashlib.blake2b
    return np.frombuffer(b"".join([blake(t.encode(), digest_size=8).digest() for t in texts]), "<i8").astype(np.int64)


def _ids_of_lists(column: pa.ChunkedArray) -> pa.ListArray:
    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    return _list_array(lengths, pa.array(_ids_of(pc.list_flatten(column))))


def _row_ids(queries: np.ndarray, positives: pa.ListArray) -> pa.Array:
    both = np.stack([queries.view(np.uint64), _hash_lists(positives)], axis=1)
    digits = both.astype(">u8").tobytes().hex().encode()
    offsets = pa.array(np.arange(0, len(digits) + 1, 32, dtype=np.int32)).buffers()[1]
    return pa.StringArray.from_buffers(len(both), offsets, pa.py_buffer(digits))


def _hash_lists(column: pa.ListArray) -> np.ndarray:
    """[n] uint64 of each list of 32 or 64-bit values: their order counts, and a null isn't an empty list."""
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = _bits(pc.list_flatten(column))
    starts = np.cumsum(lengths) - lengths
    place = (np.arange(len(values)) - np.repeat(starts, lengths)).astype(np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix(values + (place + np.uint64(1)) * _GOLDEN))])
    null = column.is_null().to_numpy(zero_copy_only=False).astype(np.uint64)
    return mix(sums[starts + lengths] - sums[starts] + mix(lengths.astype(np.uint64) + null * _GOLDEN))


def _bits(column: pa.Array) -> np.ndarray:
    """[n] uint64 with the bits of numbers; 0 for nulls, of which `_hash_column` knows otherwise."""
    zero = pa.scalar(0, column.type)
    values = column.fill_null(zero).to_numpy(zero_copy_only=False)
    return values.view(np.uint32).astype(np.uint64) if values.dtype == np.float32 else values.view(np.uint64)


def row_hashes(stored: pa.Table, named: bool) -> np.ndarray:
    """[n] uint64 of each row of a stored table, over all its columns: what a source's fingerprint is made of.

    named  whether its rows brought ids; those that `with_ids` gave say nothing new
    """
    total = np.zeros(len(stored), np.uint64)
    for field in SCHEMA:
        if field.name in _ITEMS or (field.name == Column.ID and not named):
            continue
        column = stored[field.name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks else pa.array([], field.type)
        if pa.types.is_list(field.type):
            hashed = _hash_lists(column)
        elif pa.types.is_string(field.type):
            hashed = text_ids(column.to_pylist()).view(np.uint64)
        else:
            hashed = _bits(column) ^ mix(column.is_null().to_numpy(zero_copy_only=False).astype(np.uint64))
        total = mix(total * _GOLDEN + hashed)
    return total
