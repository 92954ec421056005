"""What memory, traffic and time depend on: a model, how it is trained, and over how many GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planning.shapes import Shape

FP32 = 4
KEY_BYTES = 8


@dataclass(frozen=True)
class Texts:
    """What a step encodes: tokens of a query and of a document on the average, and documents of a query (its positive
    and its hard negatives)."""

    query_tokens: float
    document_tokens: float
    documents: int = 1

    @property
    def tokens(self) -> float:
        """Of a query and its documents."""
        return self.query_tokens + self.documents * self.document_tokens

    @property
    def length(self) -> float:
        """Mean tokens of a text."""
        return self.tokens / (1 + self.documents)


@dataclass(frozen=True)
class Workload:
    """One step of one run.

    adapter_rank   of low-rank updates of every matrix, beside a frozen base; None: every weight trains
    element_bytes  of what the model computes in: 2 in bf16, 4 in fp32
    batch          B, queries of a global batch
    dim            D of the vectors
    queue_rows     K, over all workers
    queue_bytes    of an element of a stored vector
    query_keys     int64 columns that travel with a query: two ids, and what masks compare
    queue_keys     int64 columns beside a stored vector: two ids, rejects, number and step, and what masks compare
    momentum       whether there is a momentum encoder
    cached         whether every text is encoded twice (gradient caching), else every chunk's graph is kept
    per_chunk      whether gradients are reduced with every chunk (`engine.reduction`)
    checkpointed   whether a layer keeps its input alone (`model.gradient_checkpointing`)
    eager          attention that writes its scores; else a kernel that doesn't
    fused_norms    norms in one function that keeps one tensor (on a CPU), else transformers' own
    tile           candidates scored at once; 0: the kernels of a GPU, which hold no tile in memory
    """

    shape: Shape
    texts: Texts
    gpus: int
    gpus_per_node: int
    batch: int
    dim: int
    zero_stage: int = 2
    offload: bool = False
    adapter_rank: int | None = None
    element_bytes: int = 2
    queue_rows: int = 0
    queue_bytes: int = FP32
    query_keys: int = 3
    queue_keys: int = 6
    momentum: bool = False
    cached: bool = True
    per_chunk: bool = False
    checkpointed: bool = False
    budget_tokens: int = 8192
    eager: bool = False
    fused_norms: bool = False
    tile: int = 0

    @property
    def local(self) -> float:
        """b, queries of a worker."""
        return self.batch / self.gpus

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def trained(self) -> int:
        """Elements that have gradients."""
        return self.shape.parameters if self.adapter_rank is None else self.shape.adapter_parameters(self.adapter_rank)

    @property
    def parameters(self) -> int:
        """Elements in all, those of an adapter too."""
        return self.shape.parameters + (0 if self.adapter_rank is None else self.trained)

    @property
    def local_tokens(self) -> float:
        """Tokens that a worker encodes of a batch."""
        return self.local * self.texts.tokens

    @property
    def chunks(self) -> int:
        """Chunks of a worker's batch."""
        return max(1, -(-int(self.local_tokens) // self.budget_tokens))
