"""A loss that gets a run into trouble, named by a recipe as a user names one of their own."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

from trainers.collectives import Group
from trainers.objectives.config import CustomSection
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.embedded import Embedded, LossShare
from trainers.objectives.sections.contrastive import ContrastiveSection

STUCK_AT, NAN_AT = 7, 12


class Troubled(Contrastive):
    """Worker 1 stands still at STUCK_AT, once, and its loss isn't a number at NAN_AT.

    options: `marker`, a file that says whether it has stood still
    """

    def __init__(self, section: CustomSection, group: Group) -> None:
        super().__init__(ContrastiveSection(), group)
        self._marker, self._rank = Path(section.options["marker"]), group.rank

    def __call__(self, embedded: Embedded) -> LossShare:
        share = super().__call__(embedded)
        if self._rank == 1 and embedded.step == STUCK_AT and not self._marker.exists():
            self._marker.touch()
            time.sleep(1e6)
        if self._rank == 1 and embedded.step == NAN_AT:
            return replace(share, loss=share.loss * math.nan)
        return share
