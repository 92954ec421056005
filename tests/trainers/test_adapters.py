"""LoRA and DoRA: what trains, what a checkpoint holds, and that an export, merged or alone, is the trained model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from data_services.schema import UsageError
from tests.trainers.encoders.tiny import of, padded, scrambled, tiny
from tests.trainers.test_ema import ADAPTERS, STAGES, Cutting, everyone, make, model_of, same, take_step
from tests.trainers.test_export import SAMPLE, vectors
from trainers.config import AdapterConfig, ModelConfig
from trainers.encoders.adapters import add_adapter, base_of
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.text import TextEncoder, build_encoder
from trainers.export import export_sentence_transformer, load_exported


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Pretrained towers, by architecture."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            home = tmp_path_factory.mktemp(architecture)
            encoder, spec = tiny(home / "m", of(architecture), query_prompt="find: ")
            export_sentence_transformer(scrambled(encoder).state_dict(), spec, home / "m", home / "base")
            made[architecture] = home / "base"
        return made[architecture]

    return get


def adapted(base: Path, folder: Path, **adapter) -> tuple[TextEncoder, ModelConfig]:
    config = ModelConfig(path=str(base), adapter=AdapterConfig(**{"rank": 3, "alpha": 5} | adapter))
    prepare_model_folder(config, folder)
    return build_encoder(config, folder).eval(), config


def trained(encoder: TextEncoder) -> TextEncoder:
    """With updates far from zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in encoder.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    return encoder


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_begins_as_its_base_and_trains_alone(bases, tmp_path, kind):
    encoder, _ = adapted(bases("qwen3"), tmp_path / "m", kind=kind, modules_to_save=["layers.1.mlp"])
    before = vectors(load_exported(bases("qwen3")), bases("qwen3"), "query")
    np.testing.assert_allclose(vectors(encoder, tmp_path / "m", "query"), before, atol=1e-5)
    learns = {name for name, p in encoder.named_parameters() if p.requires_grad}
    parts = ("lora_A.default", "lora_B.default", "lora_magnitude_vector.default", "modules_to_save.default")
    assert all(any(part in name for part in parts) for name in learns)
    assert len([name for name in learns if "lora_A" in name]) == 7 + 4  # the second layer's mlp trains whole
    after = vectors(trained(encoder), tmp_path / "m", "query")
    assert np.abs(after - before).max() > 0.1


CHOICES = [
    ("qwen3", {}),
    ("qwen3", {"kind": "dora", "targets": ["q_proj", "down_proj"], "modules_to_save": ["norm", "layers.0.mlp"]}),
    ("qwen3", {"targets": ["embed_tokens", "v_proj"]}),
    ("bert", {"kind": "dora", "modules_to_save": ["word_embeddings"]}),
]


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(("architecture", "adapter"), CHOICES)
def test_the_exported_model_is_the_trained_one(bases, tmp_path, architecture, adapter, merge):
    from sentence_transformers import SentenceTransformer

    encoder, config = adapted(bases(architecture), tmp_path / "m", merge=merge, **adapter)
    expected = {field: vectors(trained(encoder), tmp_path / "m", field) for field in ("query",)}
    weights = {name: w.detach().clone() for name, w in encoder.state_dict().items()}
    out = export_sentence_transformer(weights, encoder.spec, tmp_path / "m", tmp_path / "out", config)
    assert (out / "adapter_model.safetensors").exists() != merge
    assert (out / "model.safetensors").exists() == merge == (out / "config.json").exists()
    model = SentenceTransformer(str(out), device="cpu")
    for field, wanted in expected.items():
        np.testing.assert_allclose(model.encode(SAMPLE, prompt_name=field, batch_size=3), wanted, atol=1e-5)
        np.testing.assert_allclose(vectors(load_exported(out), out, field), wanted, atol=1e-5)


def test_an_adapter_alone_is_small_and_peft_loads_it(bases, tmp_path):
    from peft import AutoPeftModelForFeatureExtraction
    from safetensors.torch import load_file

    encoder, config = adapted(bases("qwen3"), tmp_path / "m", merge=False, modules_to_save=["norm"])
    weights = trained(encoder).state_dict()
    out = export_sentence_transformer(weights, encoder.spec, tmp_path / "m", tmp_path / "out", config)
    written = load_file(out / "adapter_model.safetensors")
    learned = [p for p in encoder.parameters() if p.requires_grad]
    assert sum(t.numel() for t in written.values()) == sum(p.numel() for p in learned)
    assert all(name.startswith("base_model.model.") and t.dtype == torch.float32 for name, t in written.items())
    ids, mask = padded([5, 9])
    model = AutoPeftModelForFeatureExtraction.from_pretrained(str(out)).eval()
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden, encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state)


def test_an_adapter_names_its_hub_base_only_where_that_is_what_was_trained(bases, tmp_path):
    here = ModelConfig(path=str(bases("bert")))
    prepare_model_folder(here, tmp_path / "bert")
    assert base_of(here, tmp_path / "bert") == str(tmp_path / "bert")
    hub = ModelConfig(path="someone/base")
    assert base_of(hub, tmp_path / "bert") == "someone/base"
    assert base_of(hub, bases("qwen3")) == str(bases("qwen3"))  # its causal order was dropped


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"targets": ["q_proj", "quuery"]}, r"model.adapter.targets: no module is named 'quuery'; .* q_proj"),
        ({"targets": ["roj"]}, r"model.adapter.targets: no module is named 'roj'"),
        ({"modules_to_save": ["pooler"]}, r"model.adapter.modules_to_save: no module is named 'pooler'"),
        ({"targets": ["input_layernorm"]}, r"model.adapter.targets: PEFT can't adapt \['input_layernorm'\]: .*RMSNorm"),
    ],
)
def test_names_that_no_module_has_are_refused(bases, tmp_path, adapter, message):
    with pytest.raises(UsageError, match=message):
        adapted(bases("qwen3"), tmp_path / "m", **adapter)


@pytest.mark.parametrize(
    "model",
    [
        {"config": {}, "adapter": {}},
        {"path": "x", "towers": "separate", "adapter": {"merge": False}},
    ],
)
def test_recipes_that_make_no_sense_are_refused(model):
    with pytest.raises(ValidationError, match="adapter"):
        ModelConfig(**model)


def test_an_adapter_alone_of_averaged_layers_is_refused_before_training(bases, tmp_path):
    config = ModelConfig(path=str(bases("qwen3")), mean_layers=2, adapter=AdapterConfig(merge=False))
    prepare_model_folder(config, tmp_path / "m")
    with pytest.raises(UsageError, match=r"model.adapter.merge: false, but .* 2 layers"):
        build_encoder(config, tmp_path / "m")


def checkpoint(kind, stage):
    """(names in a checkpoint, whether it was taken up, whether the next step is the same, whether the base moved)."""
    engine = make(kind, stage)
    take_step(engine)
    saved, base = engine.state(), frozen(engine.full_weights())
    again = make(kind, stage, seed=99)
    again.restore(everyone(saved))
    taken = same(again.state(), saved)
    for one in (engine, again):
        take_step(one)
    return list(saved), taken, same(engine.state(), again.state()), same(frozen(engine.full_weights()), base)


def frozen(weights):
    return {name: w for name, w in weights.items() if "base_layer" in name or name == "embed.weight"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_what_trains_and_resumes_from_it(gloo, stage):
    learns = {name for name, p in model_of("lora").named_parameters() if p.requires_grad}
    answers = gloo(2, checkpoint, "lora", stage)
    names = {name for saved, *_ in answers for name in saved}
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert names == {"layout", "global_steps", "buffer/scale", *(f"{kind}/{n}" for kind in kinds for n in learns)}
    assert all(taken and resumed and still for _, taken, resumed, still in answers)


class Beside(nn.Module):
    """A base of 10,000 weights, an adapter of 600 and a table of 900 that trains whole."""

    def __init__(self):
        super().__init__()
        self.base, self.table = nn.Linear(100, 100, bias=False), nn.Embedding(9, 100)
        add_adapter(self, AdapterConfig(rank=3, targets=["base"], modules_to_save=["table"]))

    def forward(self, x):
        return self.base(x) + self.table(torch.zeros(len(x), dtype=torch.int64))


def kept_gathered():
    from trainers.config import EngineConfig, OptimizerConfig

    class Strict(Cutting):
        _keep_gathered = Cutting.__mro__[1]._keep_gathered

    engine = Strict(Beside(), EngineConfig(zero_stage=3, precision="fp32"), OptimizerConfig(), 1)
    return sorted(name for p, name in engine.names.items() if p.ds_persist)


def test_zero3_keeps_an_adapter_gathered_but_no_large_module(gloo):
    """A twentieth of the 12,400 weights may stay: A and B, not the table."""
    assert gloo(1, kept_gathered) == [["base.lora_A.default.weight", "base.lora_B.default.weight"]]


def test_dora_scales_each_row_of_the_updated_matrix_to_its_trained_length():
    """W' = m (W + s BA) / |W + s BA|, rows of length m (Liu et al. 2024, eq. 5), against PEFT's forward."""
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    add_adapter(tower, AdapterConfig(kind="dora", rank=2, alpha=6, targets=["0"]))
    layer = tower[0]
    a, b, m = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight
    with torch.no_grad():
        b.normal_()
        m.normal_()
    moved = layer.base_layer.weight + 6 / 2 * b @ a
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(tower(x), x @ (m[:, None] * moved / moved.norm(dim=1, keepdim=True)).T)


def test_the_adapters_under_test_differ_from_the_base():
    ids = torch.arange(12).view(2, 6)
    outputs = [model_of(kind)(ids, True) for kind in ("full", "lora", "dora")]
    assert ADAPTERS.keys() >= {"full", "lora", "dora"}
    assert all((outputs[0] - other).abs().max() > 0.1 for other in outputs[1:])
