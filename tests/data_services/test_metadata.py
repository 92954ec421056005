"""What a source and a plan hold beside the rows: by row group and file, never by row."""

import json
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np

from data_services.order import Plan, RowGroups, SourceShape
from data_services.store import StoredSource, _load

GROUP_ROWS = 1024


def manifest(folder, files, groups_of_a_file, rows_of_a_group=GROUP_ROWS):
    told = {
        "files": [f"part-{i:06}/rows-000.parquet" for i in range(files)],
        "groups_per_file": [groups_of_a_file] * files,
        "row_groups": [rows_of_a_group] * (files * groups_of_a_file),
        "quarantined": {},
        "columns": [],
        "fingerprint": "0" * 32,
        "layout": "pairs",
    }
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(told))
    return _load("made up", folder)


def plan_of(source: StoredSource, batch: int = 4096) -> Plan:
    shape = SourceShape(source.name, source.rows, RowGroups.of(source.row_groups), source.fingerprint)
    return Plan(0, batch, [shape], epochs=1.0)


def test_a_plan_over_a_hundred_million_rows_takes_bytes_by_the_row_group(tmp_path):
    """100,000 row groups in 10,000 files: 10^8 rows. At 10^9 in 10^5 files ten times that, far below 1 GB."""
    tracemalloc.start()
    source = manifest(tmp_path / "many", files=10_000, groups_of_a_file=10)
    plan = plan_of(source)
    first, last = plan.rows(0), plan.rows(plan.steps - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.rows == 102_400_000
    assert len(np.unique(first[:, 1])) == len(np.unique(last[:, 1])) == 4096
    assert peak < 400 * len(source.row_groups)


def test_what_a_task_is_sent_knows_neither_rows_nor_what_was_computed(tmp_path):
    few, many = manifest(tmp_path / "few", 100, 5), manifest(tmp_path / "many", 100, 5, 100 * GROUP_ROWS)
    unread = pickle.dumps(few)
    assert few.rows == many.rows // 100
    plan = plan_of(few)
    plan.rows(0)
    assert len(pickle.dumps(few)) == len(unread)
    assert pickle.loads(pickle.dumps(few)) == few
    renamed = replace(many, folder=few.folder)
    assert len(pickle.dumps((plan, few))) <= len(pickle.dumps((plan_of(renamed), renamed))) + 64 <= len(unread) + 2_000
