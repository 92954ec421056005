"""An encoder whose vectors a test chooses, and suites of random ones."""

import numpy as np


class Table:
    """`Encoder` of the vectors it is given by text; `asked` counts how often each text was encoded."""

    def __init__(self, vectors, unit=True):
        norm = {text: max(np.linalg.norm(v), 1e-12) if unit else 1 for text, v in vectors.items()}
        self.vectors = {text: np.asarray(v, np.float32) / norm[text] for text, v in vectors.items()}
        self.unit_vectors, self.asked = unit, []

    def encode(self, texts, field):
        self.asked += texts
        return np.stack([self.vectors[text] for text in texts])


def random_table(texts, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    return Table({text: rng.normal(size=dim) for text in texts})
