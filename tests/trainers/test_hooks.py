import io
import json

import pytest

from trainers.hooks import MetricsLog, StopFile, first_line_at


def lines(steps):
    return [json.dumps({"step": s, "note": "x" * (s * 7 % 40)}) + "\n" for s in steps]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 57])
def test_bisection_finds_the_line_a_scan_finds(count):
    written = lines(range(count))
    text = "".join(written).encode()
    for step in range(count + 2):
        offset = sum(len(x) for x in written[:step])
        assert first_line_at(io.BytesIO(text), step) == offset, step


def test_opening_drops_replayed_steps_and_a_line_cut_by_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines(range(6))) + '{"step": 6, "lo')
    log = MetricsLog(path, start=4)
    log(4, {"loss": 1.5})
    got = [json.loads(line) for line in path.read_text().splitlines()]
    assert [x["step"] for x in got] == [0, 1, 2, 3, 4]
    assert got[-1]["loss"] == 1.5


def test_a_cut_line_goes_even_where_no_step_is_replayed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines(range(3))) + '{"st')
    MetricsLog(path, start=3)
    assert path.read_text() == "".join(lines(range(3)))


def test_stop_is_asked_for_by_a_file(tmp_path):
    stop = StopFile(tmp_path / "stop")
    assert not stop()
    (tmp_path / "stop").touch()
    assert stop()
