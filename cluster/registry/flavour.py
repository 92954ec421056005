"""A model folder as MLflow keeps it: a pyfunc and a Sentence Transformers flavour around the exported files.

    MLmodel, requirements.txt, conda.yaml, python_env.yaml, input_example.json
    model.sentence_transformer/    the export, byte for byte

`mlflow.pyfunc.load_model(uri).predict(texts)` embeds them as documents, with `params={"prompt_name": "query"}` as
queries; `mlflow.sentence_transformers.load_model(uri)` is `SentenceTransformer(folder)`. Written without loading the
weights: a model may be larger than this machine's memory.

Two towers, and models with a vector for each token, have a pyfunc flavour alone, with `loader.py` beside them as
code/gyre_loader.py; it takes the same prompt_name. What Sentence Transformers can't load (sounds, a user's own kinds,
vision–language models) stays a folder, which gyre loads.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

MODEL_DATA = "model.sentence_transformer"  # where mlflow.sentence_transformers.load_model looks
_LOADER = "gyre_loader"
_NEEDED = ("mlflow", "sentence-transformers", "transformers", "torch")
_EXAMPLE = ["how to read a file", "def read(path): ..."]


def write_mlflow_model(export: Path, out: Path) -> None:
    """Makes `out` of an exported folder; its files are links where the file system has them, else copies."""
    kind = _kind(export)
    if kind is None:
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
    model = Model(signature=_signature(None if kind == "tokens" else _dimensions(export)))
    _save_example(model, _EXAMPLE, str(out))
    by_code = kind != "one vector"
    if by_code:
        (out / "code").mkdir()
        shutil.copy(Path(__file__).with_name("loader.py"), out / "code" / f"{_LOADER}.py")
    mlflow.pyfunc.add_to_model(
        model,
        loader_module=_LOADER if by_code else "mlflow.sentence_transformers",
        data=MODEL_DATA,
        code="code" if by_code else None,
        conda_env="conda.yaml",
        python_env="python_env.yaml",
    )
    if not by_code:
        model.add_flavor(FLAVOR_NAME, sentence_transformers_version=version("sentence-transformers"), code=None)
    model.save(str(out / "MLmodel"))


def _signature(dimensions: int | None) -> ModelSignature:
    """Texts in, vectors [n, D] out, of token vectors (None) as many lists of vectors; and which prompt goes before the
    texts."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

    ragged = ColSpec(Array(Array(DataType.double)))
    return ModelSignature(
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, dimensions)) if dimensions else ragged]),
        params=ParamSchema([ParamSpec("prompt_name", "string", "document")]),
    )


def _kind(export: Path) -> Literal["one vector", "towers", "tokens"] | None:
    """What Sentence Transformers makes of a text: one vector, of one tower or of several, or one for each token. None
    where it can't load the folder."""
    settings = export / "config_sentence_transformers.json"
    if not settings.is_file():
        return None
    if json.loads(settings.read_text()).get("model_type") == "MultiVectorEncoder":
        return "tokens"
    return "towers" if (export / "router_config.json").exists() else "one vector"


def _dimensions(export: Path) -> int:
    from trainers.encoders.spec import ModelSpec
    from trainers.encoders.towers import Layout

    layout = Layout.load(export)
    return ModelSpec.load(export / next(iter(layout.towers.values())) if layout else export).dim


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
