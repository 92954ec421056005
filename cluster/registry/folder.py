"""`models:/NAME@ALIAS` and `models:/NAME/VERSION` as a folder on this machine."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from cluster.models.folder import fingerprint
from cluster.paths import home
from cluster.registry.flavour import MODEL_DATA
from cluster.registry.store import FINGERPRINT, Version, find_model, find_version, registry
from data_services.schema import RunError, UsageError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def find_uri(uri: str, root: Path | None = None) -> Version:
    """The version that a URI means. Raises UsageError that names the models, aliases or versions there are."""
    with registry(root) as mlflow:
        return _find(mlflow, uri)


def model_folder(uri: str, root: Path | None = None) -> tuple[Path, Version]:
    """The exported folder that a URI means, fetched under the home if it is remote, and its version.

    Raises UsageError as of `find_uri`, RunError where what was fetched isn't what was registered.
    """
    with registry(root) as mlflow:
        version = _find(mlflow, uri)
        return version_folder(mlflow, version, root), version


def version_folder(mlflow: MlflowClient, version: Version, root: Path | None = None) -> Path:
    """The exported folder of a version; see `model_folder`."""
    place = urlparse(version.source)
    if place.scheme not in ("", "file"):
        return _fetched(mlflow, version, (root or home()) / "models")
    folder = Path(unquote(place.path))
    if not folder.is_dir():
        raise UsageError(f"{version.name} version {version.version}: its folder {folder} is gone")
    return exported_in(folder)


def exported_in(folder: Path) -> Path:
    """The Sentence Transformers folder inside an MLflow model; the folder itself where it is none."""
    return folder / MODEL_DATA if (folder / MODEL_DATA).is_dir() else folder


def _find(mlflow: MlflowClient, uri: str) -> Version:
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if parts is None:
        raise UsageError(f"{uri!r}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts.groups()
    model = find_model(mlflow, name)
    if alias is not None and alias not in model.aliases:
        raise UsageError(f"{name} has no alias {alias!r}; it has {', '.join(model.aliases) or 'none'}")
    return find_version(mlflow, model, int(model.aliases[alias] if alias else number))


def _fetched(mlflow: MlflowClient, version: Version, cache: Path) -> Path:
    """The artifacts, once: what is there under its name was whole, and was what had been registered."""
    target = cache / f"{version.name}-{version.version}-{version.tags.get(FINGERPRINT, version.run_id)[:12]}"
    if not target.is_dir():
        making = target.with_name(f".{target.name}.making-{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        try:
            making.mkdir(parents=True)
            mlflow.download_artifacts(version.run_id, "model", str(making))
            verify(exported_in(making / "model"), version)
            if not target.is_dir():  # another process may have been faster
                making.rename(target)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return exported_in(target / "model")


def verify(folder: Path, version: Version) -> None:
    """Raises RunError where an exported folder isn't what was registered."""
    registered = version.tags.get(FINGERPRINT)
    if registered and fingerprint(folder) != registered:
        raise RunError(
            f"{version.name} version {version.version}: the files in {version.source} aren't those that were "
            "registered; some were changed or lost there, so train or register it again"
        )
