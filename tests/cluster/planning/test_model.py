"""The arithmetic of a plan: sizes against transformers' own, laws of memory and time, what is advised."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import parse_recipe
from cluster.planning.choices import cheapest, choices
from cluster.planning.hardware import FABRICS, GPUS
from cluster.planning.memory import RESERVE, largest_budget, memory_of
from cluster.planning.planner import Cluster, check_fits, plan
from cluster.planning.shapes import PRESETS, Shape, from_transformers
from cluster.planning.speed import Machine, seconds_per_step
from cluster.planning.traffic import collectives, wire_bytes
from cluster.planning.workload import Texts, Workload
from data_services.schema import Refused, UsageError

H100 = Machine(GPUS["h100"], FABRICS["ndr"])
OF = Workload(
    PRESETS["qwen3-embedding-0.6b"],
    Texts(64, 256),
    gpus=64,
    gpus_per_node=8,
    batch=4096,
    dim=1024,
    queue_rows=1 << 20,
    momentum=True,
)
RECIPE = {"name": "planned", "data": {"sources": [{"path": "x.jsonl"}], "batch": 1024, "epochs": 1}}


def recipe(**sections):
    model = {"model": {"path": "Qwen/Qwen3-Embedding-0.6B", "max_tokens": 512}}
    return parse_recipe(RECIPE | model | sections, "recipe")


@pytest.mark.parametrize(("preset", "billions"), [("0.6b", 0.596), ("4b", 4.02), ("8b", 7.57)])
def test_presets_have_the_parameters_of_transformers_own_model(preset, billions):
    import torch
    from transformers import AutoConfig, AutoModel

    shape = PRESETS[f"qwen3-embedding-{preset}"]
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert from_transformers(config.to_dict(), "here") == shape


def test_a_lora_of_a_matrix_is_rank_times_its_sides():
    small = Shape(hidden=8, layers=2, heads=2, key_heads=1, head_dim=4, intermediate=16, vocabulary=10)
    by_hand = 3 * ((8 + 8) + (8 + 4) + (8 + 4) + (8 + 8) + 2 * (8 + 16) + (16 + 8))
    assert small.adapter_parameters(3) == 2 * by_hand


def test_zero_shards_what_it_says():
    by_stage = [memory_of(replace(OF, zero_stage=stage)) for stage in range(4)]
    assert by_stage[0].moments == 64 * by_stage[1].moments == 8 * OF.trained
    assert by_stage[1].weights == by_stage[2].weights == 2 * OF.parameters
    assert memory_of(replace(OF, offload=True)).moments == 0
    assert memory_of(replace(OF, offload=True)).host > by_stage[2].moments


def test_the_queue_costs_memory_by_the_worker_and_no_bytes_on_the_wire():
    more = replace(OF, queue_rows=2 * OF.queue_rows)
    assert (
        memory_of(more).queue == 2 * memory_of(OF).queue == pytest.approx(4 * memory_of(replace(more, gpus=256)).queue)
    )
    assert wire_bytes(more) == wire_bytes(OF)


def test_the_largest_budget_fits_and_a_little_more_does_not():
    most = largest_budget(replace(OF, cached=True), 24e9)
    assert 0 < most < OF.local_tokens
    peaks = [memory_of(replace(OF, budget_tokens=most + more)).peak for more in (0, 256)]
    assert peaks[0] <= 24e9 * (1 - RESERVE) < peaks[1]


def test_alone_there_is_nothing_to_send_and_a_faster_fabric_is_never_slower():
    assert not collectives(replace(OF, gpus=1))
    by_fabric = [
        seconds_per_step(OF, Machine(GPUS["h100"], FABRICS[name])).total for name in ("ndr", "hdr", "ethernet")
    ]
    assert by_fabric == sorted(by_fabric)
    lifted = Machine(GPUS["h100"], FABRICS["ndr"], two_levels=frozenset({"exchange"}), overlap=True, scattered=True)
    wide = replace(OF, gpus=1024, batch=65_536)
    assert seconds_per_step(wide, lifted).total < seconds_per_step(wide, H100).total


@pytest.mark.parametrize("size", ["0.6B", "4B", "8B"])
def test_the_cheapest_that_fits_is_named_for_every_size(size):
    written = recipe(model={"path": f"Qwen/Qwen3-Embedding-{size}", "max_tokens": 512})
    planned = plan(written, Cluster(nodes=2, query_tokens=64, document_tokens=256))
    for kind in (planned.full, planned.lora):
        assert kind is not None
        assert kind.memory.peak <= planned.usable_bytes
        same = [one for one in planned.found if (one.workload.adapter_rank is None) == (kind is planned.full)]
        assert all(kind.time.total <= one.time.total for one in same if one.fits)
    whole = next(one for one in planned.found if one.workload.zero_stage == 0)
    assert whole.fits == (size == "0.6B")  # 4B: 16 bytes a weight and 4 of its gradient pass 80 GB


def test_nothing_fits_is_refused_and_offload_comes_last():
    planned = plan(recipe(), Cluster(gpus_per_node=1, memory_bytes=2e9))
    assert planned.advised is None
    with pytest.raises(Refused, match=r"nothing fits: .* GiB where 1\.7 are there"):
        check_fits(planned)
    found = choices(OF, H100, 80e9, 512)
    best = cheapest(found)
    assert best is not None
    assert not best.workload.offload


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"path": "somebody/unknown"}, "sizes of 'unknown' aren't known"),
        ({"path": "Qwen/Qwen3-Embedding-8B", "towers": "separate"}, "one text tower"),
        ({"path": "Qwen/Qwen3-Embedding-8B", "pooling": "tokens"}, "one vector a text"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(section, message):
    written = recipe(model=section, **({"objective": {"similarity": "max_sim"}} if "pooling" in section else {}))
    with pytest.raises(UsageError, match=message):
        plan(written, Cluster())


def test_the_command_prints_a_table_and_writes_the_same_as_json(tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["plan", "recipes/finetune_llm.yaml", "--nodes", "2", "--gpu-memory", "80", "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["as_written"]["fits"]
    assert len(written["choices"]) == 12
    assert (
        written["advised"]["overrides"].split()[0]
        == f"engine.zero_stage={written['advised']['workload']['zero_stage']}"
    )
    for word in ("moments of AdamW", "exchange of queries", "largest budget", "cheapest of LoRA", "assumed"):
        assert word in result.output


def test_the_command_ends_with_3_where_nothing_fits(tmp_path):
    small = ["plan", "recipes/finetune_llm.yaml", "--gpus-per-node", "1", "--gpu-memory", "1"]
    result = CliRunner().invoke(app, small)
    assert isinstance(result.exception, Refused)  # cli.main makes 3 of it
    assert "nothing fits" in str(result.exception)
