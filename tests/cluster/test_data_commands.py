"""gyre data inspect, convert and validate, from the command line."""

import gzip
import json

import pytest

ROWS = [{"anchor": f"a{i}", "positive": f"p{i} " + "long " * 40, "negative": f"n{i}", "more": 1} for i in range(19)]


@pytest.fixture
def triplets(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "triplets.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, "{[bold]"]).encode()))
    return "triplets.jsonl.gz"


def test_inspect_shows_layout_fields_and_records_and_converts_nothing(gyre, triplets, tmp_path):
    code, out, _ = gyre("data", "inspect", triplets, "--examples", "2", "--json", "found.json")
    assert code == 0
    assert "source triplets, read as triplets" in out
    assert "fields anchor, positive, negative, more" in out
    assert "negatives         negative" in out
    assert "  query           a1" in out
    assert "a2" not in out
    assert "gyre data validate triplets.jsonl.gz" in out
    assert not (tmp_path / "home").exists()
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["layout"], found["rows"], len(found["examples"])) == ("triplets", None, 2)


def test_convert_says_where_and_inspect_then_how_many(gyre, triplets, tmp_path):
    code, out, _ = gyre("data", "convert", triplets, "--json", "done.json")
    done = json.loads((tmp_path / "done.json").read_text())
    assert code == 0
    assert "rows in   20 = 19 out + 1 quarantined" in out
    assert f"stored in {done['folder']}" in out
    code, out, _ = gyre("data", "inspect", triplets)
    assert "converted: 19 rows, 1 quarantined" in out


def test_validate_lists_reasons_and_fails_above_the_share(gyre, triplets, tmp_path):
    code, out, _ = gyre("data", "validate", triplets, "--json", "found.json")
    assert code == 0
    assert "1     not JSON  triplets.jsonl.gz:20" in out
    assert "passed: 5.00% malformed, quarantine_share allows 10.00%" in out
    code, out, _ = gyre("data", "validate", triplets, "quarantine_share=0.04")
    assert code == 1
    assert "failed: 5.00% malformed, quarantine_share allows 4.00%" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["reasons"] == {"not JSON": [1, "triplets.jsonl.gz:20"]}
    assert found["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.jsonl"], "source nowhere.jsonl does not exist"),
        (["inspect", "triplets.jsonl.gz", "formt=pairs"], "unknown key formt; did you mean format?"),
        (["validate", "triplets.jsonl.gz", "format=tevatron"], "isn't of format tevatron"),
        (
            ["convert", "triplets.jsonl.gz", "query=anchr"],
            "has no field 'anchr'; its fields are .* did you mean anchor?",
        ),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_2(gyre, triplets, arguments, message):
    code, _, err = gyre("data", *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert pytest.importorskip("re").search(message, err)
