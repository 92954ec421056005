"""`python -m tests.cluster.racers WHAT`: promotions in processes of their own, forked after the slow imports.

race   eight promotions of versions 2 to 9, each held against champion 1, at once: prints what became of each
kill   a process that dies by SIGKILL at each write that a promotion makes: prints the champion and its history after
       each death, and after the same promotion is run again
register  a process that dies by SIGKILL between a version's registration and its alias: prints the versions and aliases
       after its death, and after the same run is registered again
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.store.model_registry.sqlalchemy_store  # noqa: F401  once, and not in each process
from mlflow import MlflowClient

from cluster.registry.champion import HISTORY, champion_of, history_of, move_champion
from cluster.registry.register import register
from cluster.tracking import client
from data_services.schema import Refused

NAME = "small"
WRITES = ("set_model_version_tag", "set_registered_model_tag", "set_registered_model_alias")


def in_child(work: Callable[[], Any], start: int | None = None) -> int:
    """A forked process that waits for a byte on `start`, does `work`, and ends."""
    child = os.fork()
    if child:
        return child
    if start is not None:
        os.read(start, 1)
    try:
        work()
    except BaseException:  # noqa: BLE001  a child that went on would be a second parent
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def race() -> list[dict[str, Any]]:
    start, go = os.pipe()
    results, write = os.pipe()

    def promote(version: int) -> None:
        try:
            told = {"version": version, "previous": move_champion(client(), NAME, version, 1, {}).previous}
        except Refused as refused:
            told = {"version": version, "refused": str(refused)}
        os.write(write, (json.dumps(told) + "\n").encode())

    children = [in_child(lambda v=version: promote(v), start) for version in range(2, 10)]
    os.write(go, b"x" * len(children))
    os.close(write)
    with open(results) as lines:
        told = [json.loads(line) for line in lines]
    for child in children:
        os.waitpid(child, 0)
    return told


def kill() -> list[dict[str, Any]]:
    told = []
    for write in WRITES:

        def dying(write: str = write) -> None:
            mlflow = client()
            setattr(mlflow, write, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            move_champion(mlflow, NAME, 2, 1, {})

        _, status = os.waitpid(in_child(dying), 0)
        after = client().get_registered_model(NAME)
        state = {"at": write, "signal": os.WTERMSIG(status), "champion": champion_of(after)}
        told.append(state | {"history": [entry["version"] for entry in history_of(after)]})
    moved = move_champion(client(), NAME, 2, 1, {})
    after = client().get_registered_model(NAME)
    told.append({"at": "again", "previous": moved.previous, "champion": champion_of(after)})
    told[-1]["history"] = [entry["version"] for entry in json.loads(after.tags[HISTORY])]
    return told


def register_twice() -> list[dict[str, Any]]:
    """Of the run whose id, and of the folder whose path, stand after the command's name."""
    run_id, folder = sys.argv[2], Path(sys.argv[3])
    rows = {"validation": {"trained": {"ndcg@10": 0.5}}, "heldout": {}}

    def registering(dies: bool) -> None:
        if dies:
            MlflowClient.set_registered_model_alias = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        register(NAME, folder, run_id=run_id, scores=rows, gate=None, tags={})

    told = []
    for dies in (True, False):
        _, status = os.waitpid(in_child(lambda dies=dies: registering(dies)), 0)
        model = client().get_registered_model(NAME)
        versions = [int(v.version) for v in client().search_model_versions(f"name='{NAME}'")]
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
        told.append({"killed": os.WIFSIGNALED(status), "versions": versions, "aliases": aliases})
    return told


if __name__ == "__main__":
    print(json.dumps({"race": race, "kill": kill, "register": register_twice}[sys.argv[1]]()))
