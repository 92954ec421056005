"""Towers of a user's own, by import path (`model.own`). See docs/multimodal.md.

own.json                    the import path and the options
gyre_model.json             ModelSpec: kind, width
model.safetensors           of an export, by the names of the tower's `state_dict()`
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_services.schema import UsageError
from trainers.config import ModelConfig
from trainers.encoders.modality import own_modality
from trainers.encoders.spec import ModelSpec
from trainers.encoders.tower import Tower

if TYPE_CHECKING:
    from data_services.schema import Tokenize

OPTIONS, WEIGHTS = "own.json", "model.safetensors"


def prepare(config: ModelConfig, folder: Path, texts: ModelSpec) -> None:
    """See `Modality.prepare`. The tower is made once, so that a fault in it is told before training."""
    kind = folder.name
    own = config.own[kind]
    if texts.pooling == "tokens":
        raise UsageError(f"model.own.{kind}: its items have one vector, but model.pooling is tokens; choose another")
    (folder / OPTIONS).write_text(json.dumps(own.options, indent=2) + "\n")
    tower = own_modality(own.path, own.options, f"model.own.{kind}.path").tower(texts.dim)
    if not isinstance(tower, Tower):
        raise UsageError(f"model.own.{kind}: {own.path} makes a {type(tower).__name__}; it must be a Tower")
    if tower.dim != texts.dim:
        raise UsageError(f"model.own.{kind}: {own.path} makes vectors of {tower.dim}, those of texts have {texts.dim}")
    spec = replace(tower.spec, reads=kind, code=own.path)
    spec.save(folder)


def build(config: ModelConfig, folder: Path) -> Tower:
    """See `Modality.build`."""
    own = config.own[folder.name]
    return own_modality(own.path, own.options, f"model.own.{folder.name}.path").tower(ModelSpec.load(folder).dim)


def load(folder: Path, attention: str = "auto") -> Tower:
    """See `Modality.load`."""
    from safetensors.torch import load_file

    spec, options = ModelSpec.load(folder), json.loads((folder / OPTIONS).read_text())
    assert spec.code is not None, "asked for by a folder that has some"
    tower = own_modality(spec.code, options, f"{folder}: code").tower(spec.dim)
    tower.load_state_dict(load_file(folder / WEIGHTS))
    return tower.eval()


def reader_of(folder: Path) -> Tokenize:
    """What makes the inputs of a folder's tower."""
    spec, options = ModelSpec.load(folder), json.loads((folder / OPTIONS).read_text())
    assert spec.code is not None, "asked for by a folder that has some"
    return own_modality(spec.code, options, f"{folder}: code").reader()
