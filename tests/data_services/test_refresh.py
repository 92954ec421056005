"""What is read at a step was mined after the newest step that its delay has passed since; nothing else decides."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_services.refresh import FAILED, MINED, RefreshConfig, wait_for
from data_services.schema import RunError
from tests.data_services.mining.worlds import source


@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 60))
def test_what_a_batch_reads_was_mined_after_the_newest_step_so_long_ago(every, delay, steps):
    config = RefreshConfig(every_steps=every, delay_steps=delay)
    read = [config.read_at(t) for t in range(steps)]
    for t, step in enumerate(read):
        known = [s for s in range(1, steps) if s % every == 0 and s + delay <= t]
        assert step == max(known, default=None)
    # Exactly what is read is mined.
    assert {s for s in read if s is not None} <= {s for s in range(1, steps) if config.due(s, steps)}
    last = {s for s in range(1, steps) if config.due(s, steps)}
    assert last <= {s for s in read if s is not None}


def test_without_it_every_batch_reads_the_sources_as_they_are():
    assert RefreshConfig().read_at(10**6) is None
    assert not RefreshConfig().due(100, 1000)


def test_a_reader_is_told_why_mining_failed_and_that_the_sources_are_others(tmp_path):
    stored = source(tmp_path, [("q", ["p"], [])])
    (tmp_path / FAILED).write_text("no space left")
    with pytest.raises(RunError, match=r"mining failed .*: no space left"):
        wait_for(tmp_path, [stored])
    (tmp_path / MINED).write_text(json.dumps({"of": ["another"], "fingerprints": ["x"]}))
    with pytest.raises(RunError, match="mined of other sources"):
        wait_for(tmp_path, [stored])
