"""A model folder as MLflow keeps it: a pyfunc and a Sentence Transformers flavour around the exported files.

    MLmodel, requirements.txt, conda.yaml, python_env.yaml, input_example.json
    model.sentence_transformer/    the export, byte for byte

`mlflow.pyfunc.load_model(uri).predict(texts)` embeds them as documents, with `params={"prompt_name": "query"}` as
queries; `mlflow.sentence_transformers.load_model(uri)` is `SentenceTransformer(folder)`. Written without loading the
weights: a model may be larger than this machine's memory. What those loaders can't load (two towers, a vector for each
token) stays a folder, which gyre and Sentence Transformers load.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

MODEL_DATA = "model.sentence_transformer"  # where mlflow.sentence_transformers.load_model looks
_NEEDED = ("mlflow", "sentence-transformers", "transformers", "torch")
_EXAMPLE = ["how to read a file", "def read(path): ..."]


def write_mlflow_model(export: Path, out: Path) -> None:
    """Makes `out` of an exported folder; its files are links where the file system has them, else copies."""
    if not _one_vector(export):
        shutil.copytree(export, out, copy_function=_link)
        return
    import mlflow.pyfunc
    import yaml
    from mlflow.models import Model
    from mlflow.models.utils import _save_example
    from mlflow.sentence_transformers import FLAVOR_NAME

    out.mkdir()
    shutil.copytree(export, out / MODEL_DATA, copy_function=_link)
    requirements = [f"{package}=={version(package).partition('+')[0]}" for package in _NEEDED]
    python = ".".join(map(str, sys.version_info[:3]))
    build = [f"pip=={version('pip')}"]
    conda = ["python=" + python, *(b.replace("==", "<=") for b in build), {"pip": requirements}]
    (out / "requirements.txt").write_text("\n".join(requirements) + "\n")
    (out / "conda.yaml").write_text(yaml.safe_dump({"channels": ["conda-forge"], "dependencies": conda}))
    environment = {"python": python, "build_dependencies": build, "dependencies": ["-r requirements.txt"]}
    (out / "python_env.yaml").write_text(yaml.safe_dump(environment))
    model = Model(signature=_signature(_dimensions(export)))
    _save_example(model, _EXAMPLE, str(out))
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.sentence_transformers",
        data=MODEL_DATA,
        conda_env="conda.yaml",
        python_env="python_env.yaml",
    )
    model.add_flavor(FLAVOR_NAME, sentence_transformers_version=version("sentence-transformers"), code=None)
    model.save(str(out / "MLmodel"))


def _signature(dimensions: int) -> ModelSignature:
    """Texts in, vectors [n, D] out, and which prompt goes before the texts."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    return ModelSignature(
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, dimensions))]),
        params=ParamSchema([ParamSpec("prompt_name", "string", "document")]),
    )


def _one_vector(export: Path) -> bool:
    """Whether SentenceTransformer(export).encode gives one vector a text, from one tower."""
    settings = export / "config_sentence_transformers.json"
    if not settings.is_file() or (export / "router_config.json").exists():
        return False
    return json.loads(settings.read_text()).get("model_type", "SentenceTransformer") == "SentenceTransformer"


def _dimensions(export: Path) -> int:
    from trainers.encoders.spec import ModelSpec

    return ModelSpec.load(export).dim


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
