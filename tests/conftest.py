import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.distributed.pool import GlooPool


@pytest.fixture(scope="session")
def gloo():
    """A pool of gloo ranks: `gloo(world_size, function, *arguments)`; see tests/distributed/pool.py."""
    pool = GlooPool()
    yield pool
    pool.close()
