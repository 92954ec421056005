"""The working tree as it is shipped: what .gitignore leaves, without secrets, the same bytes for the same files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from cluster.jobs.secrets import refuse_in
from data_services.schema import UsageError

MIB = 1 << 20
MAX_BYTES = 100 * MIB  # what Ray's job server takes (DASHBOARD_CLIENT_MAX_SIZE)


def _spec(patterns: str) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(patterns.split())


# Large, local or rebuilt on the other side, whatever the tree's own .gitignore says.
LOCAL = _spec("""
    .git .venv venv /runs/ /build/ /dist/ __pycache__/ *.pyc *.egg-info/ .mypy_cache/ .ruff_cache/ .pytest_cache/
    .hypothesis/ .import_linter_cache/ node_modules/
""")
# Files that hold secrets by their name.
SECRET = _spec("""
    .env .env.* !.env.example *.pem *.key *.p12 *.pfx id_rsa* id_ecdsa* id_ed25519* .netrc .pypirc .git-credentials
    auth_token kubeconfig credentials credentials.json .aws/ .ssh/ .kube/
""")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say


@dataclass(frozen=True)
class Tree:
    """files: relative to the root, in order. kept_back: {path: why}, of what .gitignore would ship and we do not."""

    root: Path
    files: tuple[Path, ...]
    size_bytes: int
    kept_back: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        told = f"{len(self.files)} files, {self.size_bytes / MIB:.1f} MiB"
        left = ", ".join(f"{path} ({why})" for path, why in self.kept_back.items())
        return f"{told}; left out: {left}" if left else told


def collect(root: Path, limit_bytes: int = MAX_BYTES) -> Tree:
    """What of `root` is shipped. Raises UsageError that names the largest files where that is over the limit."""
    files, kept_back = list[Path](), dict[str, str]()
    for path, refused in _walk(root, root, ()):
        if refused:
            kept_back[path.as_posix()] = refused
        else:
            files.append(path)
    sizes = {path: (root / path).stat().st_size for path in files}
    size = sum(sizes.values())
    if size > limit_bytes:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        told = ", ".join(f"{path} ({sizes[path] / MIB:.1f} MiB)" for path in largest)
        raise UsageError(
            f"the working tree {root} holds {size / MIB:.1f} MiB, and a job may bring {limit_bytes / MIB:.0f}; the "
            f"largest: {told}; name them in .gitignore and put data into the folder that the nodes share"
        )
    return Tree(root, tuple(files), size, kept_back)


def _walk(root: Path, folder: Path, rules: tuple[tuple[Path, GitIgnoreSpec], ...]) -> Iterator[tuple[Path, str]]:
    """(path from the root, why it is kept back, if it is) of all that isn't ignored. rules: of the folders above."""
    own = folder / ".gitignore"
    if own.is_file():
        rules = (*rules, (folder, GitIgnoreSpec.from_lines(own.read_text(errors="replace").splitlines())))
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path, is_folder = Path(entry.path), entry.is_dir(follow_symlinks=False)
        relative = path.relative_to(root)
        name = f"{relative.as_posix()}/" if is_folder else relative.as_posix()
        if LOCAL.match_file(name) or _ignored(path, is_folder, rules):
            continue
        if is_folder and not SECRET.match_file(name):
            yield from _walk(root, path, rules)
        elif refused := _refusal(root, path, name):
            yield relative, refused
        elif path.is_file():
            yield relative, ""


def _ignored(path: Path, is_folder: bool, rules: tuple[tuple[Path, GitIgnoreSpec], ...]) -> bool:
    """As git has it: the nearest .gitignore that says anything decides."""
    for folder, spec in reversed(rules):
        name = path.relative_to(folder).as_posix() + "/" * is_folder
        said = spec.check_file(name).include
        if said is not None:
            return said
    return False


def _refusal(root: Path, path: Path, name: str) -> str:
    if SECRET.match_file(name):
        return "named like a secret"
    if not path.is_symlink():
        return ""
    target = path.resolve()
    if not target.is_relative_to(root.resolve()):
        return "a link out of the tree"
    if target.is_dir():
        return "a link to a folder"
    return "a link to a secret" if SECRET.match_file(target.relative_to(root.resolve()).as_posix()) else ""


def pack(tree: Tree, target: Path, secrets: Mapping[str, str]) -> Path:
    """Writes a zip, the same bytes for the same files, so that the cluster's copy is found again.

    Raises UsageError where a file holds one of `secrets` ({value: where it stands}).
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in tree.files:
            content = (tree.root / path).read_bytes()
            refuse_in(content, secrets, str(path))
            entry = zipfile.ZipInfo(path.as_posix(), EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(tree.root / path, os.X_OK) else 0o644) << 16
            archive.writestr(entry, content)
    return target
