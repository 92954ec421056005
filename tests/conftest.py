import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

from tests.distributed.pool import GlooPool

# `make test` answers the same for the same commit; `make proof` draws examples of its own.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("fresh", deadline=None, print_blob=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def gloo():
    """A pool of gloo ranks: `gloo(world_size, function, *arguments)`; see tests/distributed/pool.py."""
    pool = GlooPool()
    yield pool
    pool.close()
