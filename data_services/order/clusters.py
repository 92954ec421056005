"""The rows of a window in runs of neighbours: of one cluster, or of clusters with neighbouring numbers.

A batch of rows that are alike has harder negatives than a random one: topic-aware sampling, Hofstätter et al.,
arXiv:2104.06967; over clusters of embeddings Morris & Rush, "Contextual Document Embeddings", arXiv:2410.02525.

The rows are set out by cluster, and that line is cut into runs of a batch's size where batches begin, so that a batch
of one source is a run. The runs are shuffled. A run ends where it is full, not where its cluster ends: rows of two
clusters may share one, of which the numbers say that they are near. Where the line begins is drawn for each window, so
that other rows meet in another epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Clusters:
    """Of a window's rows. of [n] int64; position: of the window's first place, counted through all epochs."""

    of: np.ndarray
    position: int

    def gathered(self, keys: np.ndarray, words: np.ndarray, run: int) -> tuple[np.ndarray, np.ndarray]:
        """(the row at each place [n], the places [n] in the order of the line).

        keys [n] by which the rows of a cluster follow each other; words [n] uint64, random; run: places of one
        """
        n = len(self.of)
        line = np.lexsort((keys, self.of))
        line = np.roll(line, int(words.sum() % np.uint64(n)))
        first = min(-self.position % run, n)  # the rest of a run that the window before began
        last = first + (n - first) // run * run
        begins = np.arange(first, last, run)
        shuffled = begins[np.argsort(words[line[begins]], kind="stable")]
        walk = np.arange(n)
        walk[shuffled[:, None] + np.arange(run)] = np.arange(first, last).reshape(-1, run)
        order = np.empty(n, np.int64)
        order[walk] = line
        return order, walk
