"""Faults that pass are waited for; those that don't end with a sentence."""

from __future__ import annotations

import pytest

from data_services.faults import BadRow, BadRows, patiently
from data_services.schema import RunError


class Flaky:
    """Fails so many times, then gives what it has."""

    def __init__(self, failures: int, error: OSError) -> None:
        self.failures, self.error = failures, error

    def __call__(self) -> str:
        if self.failures:
            self.failures -= 1
            raise self.error
        return "rows"


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_fault_that_passes_is_waited_for_longer_each_time(failures):
    waited: list[float] = []
    assert patiently(Flaky(failures, OSError(5, "I/O error")), "x", (0.5, 2, 8), waited.append) == "rows"
    assert waited == [0.5, 2, 8][:failures]


def test_a_fault_that_stays_ends_with_a_sentence():
    waited: list[float] = []
    with pytest.raises(RunError, match=r"source x can't be read, after 3 tries: \[Errno 5\] I/O error"):
        patiently(Flaky(9, OSError(5, "I/O error")), "source x", (1, 2), waited.append)
    assert waited == [1, 2]


def test_a_file_that_is_gone_is_not_waited_for():
    with pytest.raises(RunError, match=r"source x can't be read, and won't be helped by another try: .* gone"):
        patiently(Flaky(1, FileNotFoundError(2, "gone")), "source x", (1, 2), pytest.fail)


def test_a_bad_row_is_kept_once(tmp_path):
    bad = BadRows(tmp_path / "new")
    bad.add(BadRow("a/b", 12, "x", 3, "an image of 0 pixels"))
    bad.add(BadRow("a/b", 12, "x", 9, "an image of 0 pixels"))
    bad.add(BadRow("a/b", 2, "y", 4, "no image"))
    assert [(row.row, row.step) for row in bad.read()] == [(2, 4), (12, 3)]
    assert len(list((tmp_path / "new").iterdir())) == 2
    BadRows().add(BadRow("a", 1, "x", 3, "told in the log alone"))
    assert BadRows().read() == []
