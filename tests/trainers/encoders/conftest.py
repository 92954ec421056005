import pytest

from tests.trainers.encoders.tiny import tiny


@pytest.fixture(scope="package")
def qwen(tmp_path_factory):
    """(encoder, spec) of a tiny bidirectional decoder with a query prompt."""
    return tiny(tmp_path_factory.mktemp("qwen") / "model", query_prompt="find: ")
