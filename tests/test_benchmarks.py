import subprocess
import sys

import pytest

from benchmarks import common, startup, step, step_runs


@pytest.mark.parametrize("name", ["step", "startup"])
def test_help_tells_what_is_measured_without_importing_what_measures(name):
    code = (
        f"import runpy, sys; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_module('benchmarks.{name}', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(option in told for option in ("--json FILE", "--quick", "--rounds ROUNDS"))
    assert told.endswith("[]\n")


def test_sides_take_turns():
    assert list(common.in_turns("AB", 2)) == [(0, "A"), (0, "B"), (1, "A"), (1, "B")]


def test_a_ratio_is_of_the_runs_of_one_round():
    assert common.ratios([4.0, 9.0, 10.0], [2.0, 3.0, 2.0]) == {"median": 3.0, "min": 2.0, "max": 5.0}
    assert common.shown(common.spread([2.0, 1.0])) == "1.50 (1.00–2.00)"
    with pytest.raises(ValueError, match="2 runs and 1 of the other"):
        common.ratios([1.0, 2.0], [1.0])


def test_parts_add_up_and_what_ran_beside_takes_no_time():
    ends = {
        "began": 0.0,
        "connecting": 1.0,
        "connected": 4.0,
        "prepared": 6.0,
        "tracked": 5.0,
        "entered": 9.0,
    }
    parts = startup.parts_of(ends | {"built": 10.0, "fed": 10.0, "stepped": 12.5})
    assert sum(parts.values()) == 12.5
    assert (parts["prepared"], parts["tracked"], parts["entered"]) == (2.0, 0.0, 3.0)


def test_pauses_and_warm_up_count_for_nothing(monkeypatch):
    clock = iter([1.0, 2.0, 2.0, 102.0, 104.0])
    monkeypatch.setattr(step_runs.time, "perf_counter", lambda: next(clock))
    watch = step_runs.Stopwatch()
    watch.step_done()
    watch.step_done()
    with watch.paused():
        pass
    watch.step_done()
    assert watch.ends == [1.0, 2.0, 4.0]
    assert watch.result(10, step_runs.Length(1, 2))["pairs_per_s"] == pytest.approx(20 / 3)


def test_the_summary_has_the_promised_keys():
    def result(speed: float) -> dict:
        return {"pairs_per_s": speed, "peak_rss_bytes": 1, "cached": False}

    parts = step_runs.shares(
        {"with_queue": 3.0, "without_queue": 2.5, "enqueue": 0.1, "ema": 0.2, "forward": 1.0}, 10.0
    )
    sides = {"ours": 8.0, "st_tuned": 4.0, "st_defaults": 2.0, "ours_with_memory": 6.0}
    figures = step.summary({side: [result(speed) | {"shares": parts}] for side, speed in sides.items()})
    assert figures["over_st_equal_precision"]["median"] == 2.0
    assert figures["over_st_defaults"]["median"] == 4.0
    assert figures["queue_share_of_step"]["median"] == pytest.approx(0.06)
    assert figures["ema_share_of_step"]["median"] == pytest.approx(0.02)
    assert figures["momentum_forward_share_of_step"]["median"] == pytest.approx(0.1)
