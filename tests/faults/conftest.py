"""What the harness shares: data, a recipe in which everything has state, and what nothing disturbs."""

from __future__ import annotations

import pytest

from tests.e2e.mini import write_pairs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")
