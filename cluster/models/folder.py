"""A model's folder: what it encodes, what reads its inputs, and the encoder that it holds."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_services.schema import Encoder, RunError, Tokenize


def fingerprint(folder: Path) -> str:
    """Of a model: sha256 over its files' names and bytes."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def kinds_of(folder: Path) -> tuple[str, ...]:
    """Of items that a model on this machine encodes."""
    from trainers.encoders.spec import SPEC_FILE, ModelSpec
    from trainers.encoders.towers import Layout
    from trainers.encoders.vision_language import READS

    layout = Layout.load(folder)
    if layout and layout.by == "kind":
        return tuple(layout.towers)
    reads = ModelSpec.load(folder).reads if (folder / SPEC_FILE).exists() else "text"
    return ("text", "image", "parts") if reads == READS else ("text",)


@contextmanager
def damage_told(folder: Path) -> Iterator[None]:
    """RunError in the place of what the readers of a model's files raise where one is cut short or garbled."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, EOFError) as error:
        told = " ".join(str(error).split())[:200]
        raise RunError(f"the model in {folder} is damaged ({told}): export or fetch it again") from error


@contextmanager
def open_encoder(folder: Path, device: str = "cpu") -> Iterator[Encoder]:
    """The model of a folder as an encoder, with its prompts, length and pooling. RunError where a file is damaged."""
    from trainers.config import ModelConfig
    from trainers.encoders.local import LocalEncoder
    from trainers.encoders.model_folder import prepare_model_folder
    from trainers.encoders.spec import SPEC_FILE
    from trainers.encoders.text import build_encoder
    from trainers.encoders.towers import Layout

    if (folder / SPEC_FILE).exists() or Layout.load(folder):
        yield exported_encoder(folder, device)
        return
    config = ModelConfig(path=str(folder))
    with tempfile.TemporaryDirectory(prefix="gyre-") as place:
        made = Path(place) / "model"
        with damage_told(folder):
            prepare_model_folder(config, made)
            encoder = LocalEncoder(build_encoder(config, made).to(device), tokenizer_of(made))
        yield encoder


def exported_encoder(folder: Path, device: str = "cpu") -> Encoder:
    """The model of a folder that gyre exported, one tower or several."""
    from trainers.encoders.local import LocalEncoder
    from trainers.encoders.towers import Layout, load_towers
    from trainers.export import load_exported

    with damage_told(folder):
        tower = load_towers(folder) if Layout.load(folder) else load_exported(folder)
        return LocalEncoder(tower.to(device), tokenizer_of(folder))


def tokenizer_of(folder: Path) -> Tokenize:
    """What makes the inputs of a model folder or export, of one tower or several."""
    from data_services.inputs import Routed
    from trainers.encoders import fields
    from trainers.encoders.towers import Layout

    layout = Layout.load(folder)
    if layout is None:
        return _reader_of(folder)
    alone = {name: place for name, place in layout.towers.items() if name != fields.READS}
    readers = {place: _reader_of(folder / place) for place in set(alone.values())}
    by_name = {name: readers[place] for name, place in alone.items()}
    if fields.READS in layout.towers:
        by_name[fields.READS] = fields.reader_of(dict(by_name), folder / layout.towers[fields.READS])
    return Routed(by_name, layout.by)


def _reader_of(folder: Path) -> Tokenize:
    """Of one tower's folder."""
    from data_services.fronts import AudioFront, ImageFront
    from data_services.tokenizer import FolderTokenizer
    from data_services.vision_text import Patches, VisionText
    from trainers.encoders import own
    from trainers.encoders.spec import ModelSpec

    spec = ModelSpec.load(folder)
    if spec.code is not None:
        return own.reader_of(folder)
    if spec.reads == "image":
        return ImageFront.of(folder, spec.max_tokens)
    if spec.reads == "audio":
        return AudioFront.of(folder)
    texts = FolderTokenizer(folder, spec.max_tokens, spec.prompts)
    if spec.reads == "vision":
        image_id = json.loads((folder / "config.json").read_text())["image_token_id"]
        return VisionText(texts, Patches.of(folder), image_id, spec.template)
    return texts
