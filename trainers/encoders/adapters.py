"""Low-rank updates beside a frozen backbone, by PEFT (`model.adapter:` of a recipe).

In training an adapted module is PEFT's: `q_proj` holds `base_layer` (frozen), `lora_A.default`, `lora_B.default` and
with DoRA `lora_magnitude_vector.default`; a module trained whole holds `original_module` (frozen) and
`modules_to_save.default`. Masters, moments, averages and checkpoints are of what trains alone (trainers/engine.py).

An export has the updates merged into the weights, or is a folder with the adapter alone, that names its base:

    adapter_config.json, adapter_model.safetensors      as PEFT, transformers and Sentence Transformers read them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data_services.schema import UsageError
from trainers.config import AdapterConfig, ModelConfig
from trainers.encoders.backbone import class_options, load_backbone
from trainers.encoders.model_folder import resolve
from trainers.encoders.spec import ModelSpec

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_NAME = "default"
_IN_PEFT_MODEL = "base_model.model."  # before the backbone's names in PEFT's files


def adapt(backbone: nn.Module, config: AdapterConfig, spec: ModelSpec) -> None:
    """`add_adapter`; UsageError already here where the tower couldn't be exported as the recipe wants it."""
    if not config.merge and spec.mean_layers > 1:
        raise UsageError(
            f"model.adapter.merge: false, but an adapter alone can't say that {spec.mean_layers} layers are averaged "
            "(model.mean_layers); set it to true"
        )
    add_adapter(backbone, config)


def add_adapter(backbone: nn.Module, config: AdapterConfig) -> LoraModel:
    """Freezes the backbone and puts trainable updates into it, which change nothing yet. A_ij are drawn, B is zero.

    UsageError names the target or module to save that the backbone doesn't have, or that PEFT has no update for.
    """
    from peft import LoraModel

    _check_names(backbone, config)
    try:
        return LoraModel(backbone, _peft_config(config), _NAME)
    except ValueError as error:
        first = str(error).split(". ")[0]
        raise UsageError(f"model.adapter.targets: PEFT can't adapt {config.targets}: {first}") from error


def _peft_config(config: AdapterConfig) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha),  # PEFT divides it by r, any number will do
        lora_dropout=config.dropout,
        target_modules=config.targets,
        modules_to_save=config.modules_to_save or None,
        use_dora=config.kind == "dora",
        task_type="FEATURE_EXTRACTION",
    )


def _check_names(backbone: nn.Module, config: AdapterConfig) -> None:
    """PEFT looks for the names that it is given and passes over those it doesn't find."""
    modules = [name for name, _ in backbone.named_modules() if name]
    targets = [] if isinstance(config.targets, str) else config.targets
    for key, wanted, before in (("targets", targets, "."), ("modules_to_save", config.modules_to_save, "")):
        for name in wanted:
            if not any(module == name or module.endswith(before + name) for module in modules):
                known = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in modules if module[-1].isalpha()}))
                raise UsageError(f"model.adapter.{key}: no module is named {name!r}; this tower has {known}")


def merged(weights: Mapping[str, Tensor], config: AdapterConfig, model_folder: Path) -> dict[str, Tensor]:
    """The backbone's weights with the updates in them, by the names that they have without an adapter.

    weights  by the names of the adapted backbone, fp32; a merged one is written over
    """
    return _filled(weights, config, model_folder).merge_and_unload().state_dict()


def write_adapter(
    weights: Mapping[str, Tensor], config: AdapterConfig, model_folder: Path, base: str, out: Path
) -> None:
    """The adapter alone, in fp32, in PEFT's format.

    weights  by the names of the adapted backbone
    base     folder or hub id of the backbone without it
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tuner = _filled(weights, config, model_folder)
    trained = get_peft_model_state_dict(tuner.model, adapter_name=_NAME, save_embedding_layers=False)
    tensors = {}
    for name, tensor in trained.items():
        # PEFT leaves this ending out and reads both; transformers 5.23 would draw DoRA's lengths afresh without it.
        whole = name + ".weight" if name.endswith("lora_magnitude_vector") else name
        tensors[_IN_PEFT_MODEL + whole] = tensor.to("cpu", torch.float32).contiguous()
    save_file(tensors, out / ADAPTER_FILE, metadata={"format": "pt"})
    written: Any = tuner.peft_config[_NAME]
    written.base_model_name_or_path, written.inference_mode = base, True
    written.save_pretrained(out)


def _filled(weights: Mapping[str, Tensor], config: AdapterConfig, model_folder: Path) -> LoraModel:
    """An adapted backbone whose weights are `weights` themselves."""
    import torch
    from transformers import AutoConfig, AutoModel

    trusted = ModelSpec.load(model_folder).trust_remote_code
    architecture = AutoConfig.from_pretrained(model_folder, trust_remote_code=trusted)
    with torch.device("meta"):
        options = class_options(model_folder, trusted)
        backbone = AutoModel.from_config(architecture, trust_remote_code=trusted, **options)
        tuner = add_adapter(backbone, config)
    wanted = backbone.state_dict().keys()
    missing = next((name for name in wanted if name not in weights), None)
    if missing:
        raise ValueError(f"weights: {missing} is missing, which the model folder and its adapter have")
    backbone.load_state_dict({name: weights[name].detach() for name in wanted}, assign=True)
    return tuner


def base_of(config: ModelConfig, model_folder: Path) -> str:
    """What an adapter names as its base: the hub id where the model folder changed nothing of it, else the folder."""
    changed = json.loads((model_folder / "config.json").read_text()).get("is_causal") is False
    if config.path is None or Path(config.path).is_dir() or changed or config.path.startswith("models:"):
        return str(model_folder.resolve())
    return config.path


def load_adapted(folder: Path, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    """The backbone of a folder with an adapter alone: its base, with the updates merged."""
    from peft import PeftModel

    if not (folder / ADAPTER_FILE).exists():
        raise UsageError(f"{folder} has no {ADAPTER_FILE}; convert the adapter, gyre loads no pickles")
    base = json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"]
    place = resolve(base, trust_remote_code, key=f"{folder / CONFIG_FILE}: base_model_name_or_path")
    backbone = load_backbone(place, attention, trust_remote_code)
    return PeftModel.from_pretrained(backbone, str(folder)).merge_and_unload()
