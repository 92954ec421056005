"""Tiny towers and their tokenizer, for tests that need a whole model folder."""

from pathlib import Path

import torch

from data_services.tokenizer import train_bpe
from trainers.config import FromConfig, ModelConfig
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.spec import ModelSpec
from trainers.encoders.text import TextEncoder, build_encoder

TEXTS = [
    "def read_file(path):\n    with open(path) as file:\n        return file.read()",
    "Return the text of a file.",
    "class HTTPResponse(Exception):\n    status_code = 200\n" * 6,
    "sum",
    "for key, value in mapping.items(): print(key, value)",
]
TINY = FromConfig(hidden=32, layers=2, heads=2, intermediate=48, vocabulary=400)


def train_tokenizer(vocabulary: int, folder: Path) -> None:
    train_bpe(TEXTS, vocabulary, folder)


def train_tokenizer_with_mask(vocabulary: int, folder: Path) -> None:
    from transformers import AutoTokenizer

    train_bpe(TEXTS, vocabulary, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)


def tiny(folder: Path, tower: FromConfig = TINY, **keys) -> tuple[TextEncoder, ModelSpec]:
    config = ModelConfig(config=tower, **({"max_tokens": 40} | keys))
    train = train_tokenizer_with_mask if config.query_length else train_tokenizer
    spec = prepare_model_folder(config, folder, train)
    torch.manual_seed(0)
    return build_encoder(config, folder).eval(), spec


def of(architecture: str) -> FromConfig:
    """TINY of another architecture."""
    return TINY.model_copy(update={"architecture": architecture})


def scrambled(encoder: TextEncoder) -> TextEncoder:
    """Weights far from their initial scale, so that every part of the model matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return encoder


def padded(lengths: list[int], vocabulary: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, vocabulary, mask.shape) * mask, mask
