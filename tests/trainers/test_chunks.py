"""What masks compare: the keys of a batch."""

import numpy as np
import torch

from data_services.schema import Batch, Ragged
from trainers.chunks import keys_of


def test_frequencies_are_of_positives_and_a_hard_negative_counts_as_usual():
    queries, documents = Ragged.of([[1], [2]]), Ragged.of([[1], [2], [3], [4]])
    batch = Batch(
        step=0,
        queries=queries,
        documents=documents,
        query_ids=np.array([1, 2]),
        document_ids=np.array([11, 12, 13, 14]),
        owners=np.array([0, 1, 1, 0]),
        relations=np.array([1, 1, 1, -1], np.int8),
        rows=np.arange(2),
        prompt_tokens=np.zeros(6, np.int64),
        frequencies=np.array([1.0, 8.0], np.float32),
        global_queries=2,
        chunks=(np.arange(6),),
    )
    query_keys, document_keys = keys_of(batch, None, torch.device("cpu"))
    assert query_keys.log_q is None
    torch.testing.assert_close(document_keys.log_q, torch.tensor([1.0, 8.0, 8.0, 1.0]).log())
