"""What a kind of item needs to have a tower beside that of texts: one file each, built in or a user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_services.imports import import_object
from trainers.encoders.spec import ModelSpec

if TYPE_CHECKING:
    from data_services.schema import Tokenize
    from trainers.config import ModelConfig
    from trainers.encoders.tower import Tower


class Modality(Protocol):
    """A built-in one is a module with these functions."""

    def prepare(self, config: ModelConfig, folder: Path, texts: ModelSpec) -> None:
        """Writes into the tower's folder what `build` needs, gyre_model.json (`ModelSpec`) among it.

        texts: of the tower that its vectors are compared with, which says their width. UsageError names the key that
        can't be honoured.
        """
        ...

    def build(self, config: ModelConfig, folder: Path) -> Tower:
        """The tower to train, in fp32, on the CPU; random weights from the current torch generator."""
        ...

    def load(self, folder: Path, attention: str = "auto") -> Tower:
        """That of an export, in evaluation mode, on the CPU."""
        ...


class OwnModality(Protocol):
    """A user's own, at `model.own.KIND.path`: made with the recipe's options, in data tasks and workers alike."""

    def __init__(self, options: Mapping[str, Any]) -> None: ...

    def reader(self) -> Tokenize:
        """What makes inputs of items (`schema.Inputs`); it pickles, and imports no torch."""
        ...

    def tower(self, dim: int) -> Tower:
        """A tower whose vectors have that width; random weights from the current torch generator."""
        ...


_BUILT_IN = {
    "image": "trainers.encoders.image",
    "audio": "trainers.encoders.audio",
    "parts": "trainers.encoders.fields",
}


def modality_of(kind: str, config: ModelConfig) -> Modality:
    """That of a recipe's tower."""
    if kind in config.own:
        from trainers.encoders import own

        return own
    return importlib.import_module(_BUILT_IN[kind])  # type: ignore[return-value]


def loader_of(spec: ModelSpec) -> Callable[[Path, str], Tower]:
    """What loads a tower's export."""
    if spec.code is not None:
        from trainers.encoders import own

        return own.load
    return importlib.import_module(_BUILT_IN[spec.reads]).load


def own_modality(path: str, options: Mapping[str, Any], key: str) -> OwnModality:
    """The user's object at an import path."""
    return import_object(path, key)(options)
