"""Secrets that this shell holds, so that nothing that leaves it carries one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from data_services.schema import UsageError

NAMED_SO = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSPHRASE|ACCESS_KEY|API_KEY)$", re.IGNORECASE)
SHORTEST = 12  # characters: a shorter value would be found in ordinary text
RAY_TOKEN_FILE = Path("~/.ray/auth_token")


def secrets_here(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """{value: where it stands}: variables named like secrets, and the token file that Ray reads."""
    found = {v: name for name, v in environment.items() if NAMED_SO.search(name) and len(v) >= SHORTEST}
    file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or RAY_TOKEN_FILE).expanduser()
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return found
    return found | ({token: str(file)} if len(token) >= SHORTEST else {})


def refuse_in(content: bytes, secrets: Mapping[str, str], where: str) -> None:
    """Raises UsageError that names the secret, never its value."""
    for value, name in secrets.items():
        if value.encode() in content:
            raise UsageError(
                f"{where} holds the value of {name}, and would carry it to the cluster: take it out; secrets reach "
                "a job through the cluster's own environment (docs/cluster.md)"
            )


def refuse_in_command(words: Iterable[str], secrets: Mapping[str, str]) -> None:
    """A command line is shown to everyone on the machine, and kept with the job."""
    refuse_in("\n".join(words).encode(), secrets, "the command line")


def refuse_password(name: str, uri: str) -> None:
    """Raises UsageError for `scheme://user:password@host`: variables of a job can be read by all who see its page."""
    if urlsplit(uri).password:
        raise UsageError(
            f"{name} holds a password, and would carry it to the cluster: name the server alone, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the cluster's own environment"
        )
