"""A home whose MLflow tables are made once for the whole session: making them takes seconds."""

import shutil

import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    from cluster.tracking import client

    root = tmp_path_factory.mktemp("store")
    client(root)
    return root / "mlflow.db"


@pytest.fixture
def root(empty_store, tmp_path, monkeypatch):
    """A home with an empty store, set as GYRE_HOME."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(empty_store, home)
    monkeypatch.setenv("GYRE_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return home
