"""Work without training: what a trial is worth is a known function of its settings, and some misbehave on demand.

`objective.temperature` is the place on a parabola; `seed` asks for a failure: see FAILURES.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

from cluster.search.crew import TrainingWork

FAILS, NAN, DIES_ONCE, HANGS, PACED, STUCK, TOO_LARGE = 11, 12, 13, 14, 15, 16, 17
BEST = 0.1
PACE = "pace.json"  # in the search's folder: how far each trial that is PACED may go; one that isn't there, not at all


class Surface:
    """Keeps a checkpoint of its own, a file with the step, so that a trial that is taken up again goes on."""

    @staticmethod
    def shards(ready: Any) -> Sequence[Any]:
        return range(ready.recipe.cluster.workers)

    def begin(self, ready: Any, shard: int, search: Any) -> int:
        assert int(os.environ["RANK"]) == shard
        self.recipe, self.run = ready.recipe, ready.run
        self.first = shard == 0
        self.step = int(self.saved.read_text()) if self.saved.exists() else 0
        if (self.run.root / "begun.jsonl").exists() and self.first:
            (self.run.root / "stuck").touch()
        if self.first:
            with open(self.run.root / "begun.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step, "pid": os.getpid(), "at": time.time()}) + "\n")
        return self.step

    @property
    def saved(self) -> Any:
        return self.run.root / "at"

    def pace(self) -> int:
        trial = self.run.root.parent
        paces = trial.parent.parent / PACE
        return json.loads(paces.read_text()).get(trial.name, 0) if paces.exists() else 0

    def advance(self, until: int) -> dict[str, float]:
        import torch
        import torch.distributed as dist

        seed, value = self.recipe.seed, worth(self.recipe.objective.temperature, until)
        if seed == FAILS:
            raise ValueError("this one always fails")
        if seed == TOO_LARGE:
            raise torch.OutOfMemoryError("tried to allocate 9 TiB")
        if seed == DIES_ONCE and not (self.run.root / "died").exists():
            (self.run.root / "died").touch()
            os._exit(1)
        while seed == HANGS:
            time.sleep(1)
        while seed == STUCK and not (self.run.root / "stuck").exists():  # until it is taken up again
            time.sleep(1)
        for _ in range(until - self.step):
            while seed == PACED and self.step >= self.pace():
                time.sleep(0.05)
            dist.all_reduce(torch.ones(1))  # they are in one process group
            self.step += 1
        if self.first:
            self.saved.write_text(str(self.step))
            rates = {"loss": 1.0, "seconds": 0.1, "pairs_per_s": 1.0, "tokens_per_s": 1.0}
            with open(self.run.metrics, "a") as file:
                file.write(json.dumps({"step": until - 1} | rates) + "\n")
        dist.barrier()
        return {"ndcg@10": float("nan") if seed == NAN else value}

    def end(self) -> None:
        pass


class Counted(TrainingWork):
    """Training that tells which process did it."""

    def begin(self, ready: Any, shard: Any, search: Any) -> int:
        if os.environ["RANK"] == "0":
            with open(ready.run.root / "begun.jsonl", "a") as file:
                file.write(json.dumps({"pid": os.getpid()}) + "\n")
        return super().begin(ready, shard, search)


def worth(temperature: float, step: int) -> float:
    """More with every step, most at BEST."""
    return (1 - 2 * abs(temperature - BEST)) * step / (step + 1)
