"""Checkpoints of a run: every worker writes its own file, rank 0 commits with a manifest, written last.

    <run>/checkpoints/step-00000050.a3f9c1/     the attempt's id is in the name: attempts never share a folder
        rank-00000-of-00002.safetensors         tensors of one worker: weights, optimizer, average, queue
        rank-00000-of-00002.json                size and checksum of that file
        state.json                              what is not a tensor: step, plan, choices, fingerprints
        manifest.json                           the commit marker: files, sizes, checksums, world size

A folder without a manifest never existed. Older checkpoints go only after a newer one is committed, and a worker
that lost its lease (another attempt of the run has started) can't commit.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import RunError
from trainers.config import CheckpointConfig

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.collectives import Group

MANIFEST, STATE, LEASE = "manifest.json", "state.json", "lease.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint on disk. `world_size` files, one a worker."""

    folder: Path
    step: int
    world_size: int

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.folder / STATE).read_text())

    def tensors(self, prefix: str = "") -> list[Mapping[str, Tensor]]:
        """What each worker saved under `prefix`, in rank order, without the prefix; read when asked for."""
        files = [self.folder / rank_file(rank, self.world_size) for rank in range(self.world_size)]
        return [SavedTensors(path, prefix) for path in files]

    def verify(self, rank: int | None = None) -> None:
        """Raises RunError naming the first file that is missing, truncated or changed.

        With a rank, only what every worker reads and that rank's own file: together the workers read each once.
        """
        manifest = json.loads((self.folder / MANIFEST).read_text())
        for i, (name, (size, checksum)) in enumerate(manifest["files"].items()):
            if rank is not None and name != STATE and (i - 1) != rank:
                continue
            path = self.folder / name
            if not path.exists():
                raise RunError(f"checkpoint {self.folder} is damaged: {name} is missing; resume from an older one")
            if path.stat().st_size != size or file_checksum(path) != checksum:
                raise RunError(f"checkpoint {self.folder} is damaged: {name} changed; resume from an older one")


class SavedTensors(Mapping):
    """The tensors of a safetensors file whose names begin with `prefix`; each is read, to the CPU, when asked for."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        from safetensors import safe_open

        self._file, self._prefix = safe_open(path, framework="pt"), prefix
        self._names = {name for name in self._file.keys() if name.startswith(prefix)}  # noqa: SIM118  not a dict

    def __getitem__(self, name: str) -> Tensor:
        if self._prefix + name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def committed(root: Path) -> list[Checkpoint]:
    """The committed checkpoints under `root`, oldest first."""
    found = []
    for folder in root.glob("step-*"):
        if (folder / MANIFEST).exists():
            manifest = json.loads((folder / MANIFEST).read_text())
            found.append(Checkpoint(folder, manifest["step"], manifest["world_size"]))
    return sorted(found, key=lambda c: (c.step, (c.folder / MANIFEST).stat().st_mtime_ns))


def latest(root: Path) -> Checkpoint | None:
    """The newest committed checkpoint under `root`, or None."""
    every = committed(root)
    return every[-1] if every else None


def fork(checkpoint: Checkpoint, root: Path, lineage: Mapping[str, Any]) -> Checkpoint:
    """The first checkpoint of another run, under its `root`: the same tensors and step, another lineage."""
    folder = root / f"step-{checkpoint.step:08d}.{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    for rank in range(checkpoint.world_size):
        name = rank_file(rank, checkpoint.world_size)
        link_or_copy(checkpoint.folder / name, folder / name)
    write_json(folder / STATE, checkpoint.state | {"lineage": dict(lineage)})
    manifest = json.loads((checkpoint.folder / MANIFEST).read_text())
    manifest["files"][STATE] = [(folder / STATE).stat().st_size, file_checksum(folder / STATE)]
    write_json(folder / MANIFEST, manifest)
    return Checkpoint(folder, checkpoint.step, checkpoint.world_size)


def link_or_copy(path: str | Path, there: str | Path) -> None:
    """A second name of a file that nobody writes to; where the file system knows none, a copy."""
    try:
        os.link(path, there)
    except OSError:
        shutil.copyfile(path, there)


class CheckpointStore:
    """Writes and retires the checkpoints of one attempt of a run. Every method is collective over `group`."""

    def __init__(self, root: Path, config: CheckpointConfig, group: Group) -> None:
        self.root, self.config, self.group = root, config, group
        self.attempt: str = group.broadcast_object(secrets.token_hex(3))
        if group.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            write_json(root / LEASE, {"attempt": self.attempt})

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Checkpoint:
        """Writes and commits the checkpoint of `step`; retires old ones.

        tensors: this worker's, by name. state: JSON of the whole run, rank 0's is written.
        Raises RunError on every worker when any of them could not write; what was committed before stays.
        """
        folder = self.root / f"step-{step:08d}.{self.attempt}"
        failures = self._everywhere(lambda: self._write_share(folder, tensors))
        if not failures:
            failures = self._everywhere(lambda: self._commit(folder, step, state) if self.group.rank == 0 else None)
        if failures:
            if self.group.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            good = latest(self.root)
            last = f"the last good one is step {good.step}, {good.folder}" if good else "there is none before it"
            raise RunError(f"the checkpoint of step {step} could not be written ({failures}); {last}")
        if self.group.rank == 0:
            self._retire()
        return Checkpoint(folder, step, self.group.size)

    def _everywhere(self, write: Any) -> str:
        """Runs `write` on every worker; the first worker's failure as a sentence, empty where all succeeded."""
        failure = ""
        try:
            write()
        except OSError as error:
            failure = f"worker {self.group.rank}: {error.strerror or error}: {error.filename or self.root}"
        return next((f for f in self.group.gather_objects(failure) if f), "")

    def _write_share(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / rank_file(self.group.rank, self.group.size)
        write_tensors(path, tensors)
        write_json(path.with_suffix(".json"), [path.stat().st_size, file_checksum(path)])

    def _commit(self, folder: Path, step: int, state: Mapping[str, Any]) -> None:
        write_json(folder / STATE, dict(state))
        files = {STATE: [(folder / STATE).stat().st_size, file_checksum(folder / STATE)]}
        for rank in range(self.group.size):
            name = rank_file(rank, self.group.size)
            files[name] = json.loads((folder / name).with_suffix(".json").read_text())
        holder = json.loads((self.root / LEASE).read_text())["attempt"]
        if holder != self.attempt:
            raise OSError(f"attempt {holder} of this run has taken over from {self.attempt}")
        manifest = {"format": FORMAT, "step": step, "world_size": self.group.size, "files": files}
        write_json(folder / MANIFEST, manifest)

    def _retire(self) -> None:
        """Keeps the newest `keep` committed checkpoints; removes what other attempts left unfinished."""
        every = committed(self.root)
        keep = {c.folder for c in every[-self.config.keep :]}
        for folder in self.root.glob("step-*"):
            if folder not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors, synced to the disk. Raises OSError, a full disk among them."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:  # the library wraps the operating system's error in its own
        raise OSError(f"{error}") from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a temporary file beside it, synced, then renamed."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(3)}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_checksum(path: Path) -> int:
    """CRC-32 of a file's bytes: finds truncation and flipped bits, not malice."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
