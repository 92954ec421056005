"""Parquet, and Arrow IPC in its two forms: the file (Feather) and the stream (what `datasets` writes)."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from data_services.fields import check_fields
from data_services.files import File, reading
from data_services.readers.blocks import Block, Want, blocks_of_table

_ARROW_FILE = b"ARROW1"


def parquet_blocks(file: File, want: Want, start: int = 0, stop: int | None = None) -> Iterator[Block]:
    """The row groups start … stop-1 of a Parquet file, its fields alone; rows are numbered from 1 in the file."""
    with reading(file), file.open() as opened:
        parquet = pq.ParquetFile(opened)
        check_fields(parquet.schema_arrow.names, want.fields, file.uri)
        groups = range(start, parquet.num_row_groups if stop is None else stop)
        number = sum(parquet.metadata.row_group(group).num_rows for group in range(start))
        for batch in parquet.iter_batches(want.block_rows, row_groups=list(groups), columns=want.fields.named):
            yield from blocks_of_table(file.name, pa.Table.from_batches([batch]), number)
            number += len(batch)


def parquet_group_bytes(file: File) -> list[int]:
    """Bytes of each row group of a Parquet file, as they are stored."""
    with reading(file), file.open() as opened:
        metadata = pq.ParquetFile(opened).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return [sum(group.column(c).total_compressed_size for c in range(group.num_columns)) for group in groups]


def parquet_fields(file: File) -> list[str]:
    with reading(file), file.open() as opened:
        return list(pq.ParquetFile(opened).schema_arrow.names)


def arrow_blocks(file: File, want: Want) -> Iterator[Block]:
    number = 0
    with reading(file), file.open() as opened:
        for batch in _batches(opened):
            check_fields(batch.schema.names, want.fields, file.uri)
            table = pa.Table.from_batches([batch]).select(want.fields.named)
            yield from blocks_of_table(file.name, table, number, want.block_rows)
            number += len(batch)


def arrow_fields(file: File) -> list[str]:
    with reading(file), file.open() as opened:
        return list(_open(opened).schema.names)


def bytes_fields(file: File, arrow: bool) -> set[str]:
    """The fields that hold bytes, as such or beside a path (`datasets` keeps images as {bytes, path})."""
    with reading(file), file.open() as opened:
        schema = _open(opened).schema if arrow else pq.ParquetFile(opened).schema_arrow
    return {field.name for field in schema if _has_bytes(field.type)}


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _has_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return "bytes" in kind.names and _has_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _open(opened: pa.NativeFile) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    is_file = opened.read(len(_ARROW_FILE)) == _ARROW_FILE
    opened.seek(0)
    return pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)


def _batches(opened: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    reader = _open(opened)
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)
