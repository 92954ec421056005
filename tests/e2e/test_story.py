"""docs/registry.md's story, from its own code blocks: train twice, compare, promote, refuse, serve, roll back."""

import re
import shlex
import sys

import pytest

from benchmarks.serve import free_port
from cluster import cli, registry
from cluster.config import ClusterConfig
from cluster.session import connect
from tests.e2e.commands import TREE

PORT = "port=8765"  # the page's; on a test's machine it may be taken
BLOCK = re.compile(r"(?ms)^<!-- story(?:: (?P<file>\S+))? -->\n```\w*\n(?P<text>.*?)^```")


def run_line(line, monkeypatch, capsys):
    """A `gyre` command in this process; its output. The comment says how it exits, if not with 0."""
    command, _, comment = line.partition("  # exits ")
    name, *arguments = shlex.split(command)
    assert name == "gyre"
    monkeypatch.setattr(sys, "argv", ["gyre", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr()
    assert (ended.value.code or 0) == int(comment or 0), f"{line}: {out.err}"
    return out.out


def test_the_story_happens_as_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GYRE_HOME", str(tmp_path / "runs"))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "GYRE_SERVE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    names, told = {}, {}
    with connect(ClusterConfig(workers=2, cpus_for_data=2), tmp_path / "runs"):  # one cluster for all commands
        for block in BLOCK.finditer((TREE / "docs" / "registry.md").read_text()):
            if block["file"]:
                (tmp_path / block["file"]).write_text(block["text"])
            elif block["text"].startswith("gyre "):
                for line in block["text"].splitlines():
                    told[line] = run_line(line, monkeypatch, capsys)
            else:
                assert (PORT in block["text"]) == ("serving(" in block["text"])
                exec(block["text"].replace(PORT, f"port={free_port()}"), names)
    versions = {v.version: v for v in registry.list_models("story")}
    assert versions[1].aliases == ("champion",)
    assert versions[2].aliases == ("candidate",)
    assert versions[2].promotion["previous"] == 1
    assert {row["gate"].split(" (")[0] for row in versions[2].promotion["gates"]} == {
        "pairs not worse",
        "pairs better",
        "export_parity",
        "weights",
        "licence",
    }
    assert set(versions[2].lineage) == {"run", "data", "config", "parent", "checkpoint", "code"}
    refused = next(out for line, out in told.items() if "exits 3" in line)
    assert re.search(r"(?m)^pairs better .* FAILED$", refused)
    compared = next(out for line, out in told.items() if line.startswith("gyre compare"))
    assert re.search(r"(?m)^pairs +nDCG@10 .*\+0\.", compared)
    assert names["words"]
