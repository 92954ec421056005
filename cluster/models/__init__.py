"""What is done with a trained model: find it, open it, search with it, hand it out, look at its checkpoints."""

from cluster.models.checkpoints import SavedStep, checkpoints
from cluster.models.export import Export, export
from cluster.models.folder import exported_encoder, fingerprint, open_encoder, tokenizer_of
from cluster.models.query import Hit, QueryResult, query
from cluster.models.reference import ModelRef, resolve

__all__ = [
    "Export",
    "Hit",
    "ModelRef",
    "QueryResult",
    "SavedStep",
    "checkpoints",
    "export",
    "exported_encoder",
    "fingerprint",
    "open_encoder",
    "query",
    "resolve",
    "tokenizer_of",
]
