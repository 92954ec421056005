"""Which rows make global batch `t`: a pure function of the seed, the sources, their weights, and `t`.

plan        the batches of a run; its state is `t` and a list of segments
    schedule    stages, scheduled weights and limits, laid out as segments before step 0
    segments    what each batch of one segment draws, by mixture.py: a source and a position in it
    epochs      the row at a position, by windows of row groups
    duplicates  the order inside a window, equal ids kept apart
    clusters    the same with rows of a cluster together
    shapes      what is known of a source
"""

from data_services.order.duplicates import Carried, IdColumns, duplicate_rows
from data_services.order.epochs import EpochOrder
from data_services.order.mixture import CYCLE, Mixture, mixing_weights
from data_services.order.plan import Plan
from data_services.order.schedule import Stage
from data_services.order.segments import Segment
from data_services.order.shapes import RowGroups, SourceShape

__all__ = [
    "CYCLE",
    "Carried",
    "EpochOrder",
    "IdColumns",
    "Mixture",
    "Plan",
    "RowGroups",
    "Segment",
    "SourceShape",
    "Stage",
    "duplicate_rows",
    "mixing_weights",
]
