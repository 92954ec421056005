"""A model handed out: its Sentence Transformers folder copied, and pushed to the hub where that is asked for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.models.reference import resolve
from data_services.schema import RunError, UsageError


@dataclass(frozen=True)
class Export:
    """An exported Sentence Transformers folder. url: where it was pushed to, None where it wasn't."""

    model: str
    folder: Path
    url: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"model": self.model, "folder": str(self.folder), "url": self.url}


def export(
    model: str, folder: Path, root: Path | None = None, push_to_hub: str | None = None, public: bool = False
) -> Export:
    """Copies MODEL's Sentence Transformers folder to `folder`, whole or not at all.

    push_to_hub: a repository OWNER/NAME of the Hugging Face hub to which it goes as well, made private unless `public`

    Raises UsageError for a model that isn't there or a run that hasn't finished, and for a folder that isn't empty;
    RunError where the hub doesn't take it, with the copy in place.
    """
    found = resolve(model, root)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already and not empty; name a new folder")
    making = folder.with_name(folder.name + ".making")
    try:
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(found.folder, making)
        if folder.exists():
            folder.rmdir()
        making.rename(folder)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        raise RunError(f"{folder} can't be written: {error}") from error
    if push_to_hub is None:
        return Export(found.name, folder.absolute())
    from cluster.hub import push

    return Export(found.name, folder.absolute(), push(folder, push_to_hub, public))
