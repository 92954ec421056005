"""The model registry: versions with their evidence, the aliases `candidate` and `champion`, promotion, return.

Nothing else in the project moves an alias. `lock` keeps promotions apart, `champion` moves the alias and remembers,
`promotion` gathers evidence and holds it against the gates, `flavour` is the form in which MLflow keeps a model.
"""

from cluster.registry.champion import Move, rollback
from cluster.registry.folder import find_uri, model_folder
from cluster.registry.promotion import GateFailed, gate_result, promote, read_gates
from cluster.registry.register import register
from cluster.registry.store import LINEAGE, Version, list_models

__all__ = [
    "LINEAGE",
    "GateFailed",
    "Move",
    "Version",
    "find_uri",
    "gate_result",
    "list_models",
    "model_folder",
    "promote",
    "read_gates",
    "register",
    "rollback",
]
