"""The contrastive loss of a whole batch, one query and one positive at a time, dense, in float64, in one process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainers.negative_queue import QueueRows
from trainers.objectives.embedded import Embedded
from trainers.objectives.keys import UNKNOWN, Keys
from trainers.objectives.sections.contrastive import ContrastiveSection


@dataclass(frozen=True)
class Pool:
    """Vectors and keys end to end; `kind` and `index` say what each is: ("document", 3) is document 3 of the batch."""

    vectors: Tensor
    keys: Keys
    kind: list[str]
    index: list[int]

    @classmethod
    def of(cls, kind: str, vectors: Tensor, keys: Keys) -> Pool:
        return cls(vectors, keys, [kind] * len(vectors), list(range(len(vectors))))

    def __add__(self, other: Pool) -> Pool:
        return Pool(
            torch.cat(_equally_long(self.vectors, other.vectors)),
            end_to_end([self.keys, other.keys]),
            self.kind + other.kind,
            self.index + other.index,
        )


def _equally_long(*vectors: Tensor) -> list[Tensor]:
    """Token vectors [n, L, D] padded to the longest L; vectors [n, D] as they are."""
    if vectors[0].ndim == 2:
        return list(vectors)
    longest = max(v.shape[1] for v in vectors)
    return [pad(v, (0, 0, 0, longest - v.shape[1])) for v in vectors]


def end_to_end(keys: list[Keys]) -> Keys:
    """Rows of all; a column that only some know is UNKNOWN elsewhere."""

    def column(name: str) -> Tensor | None:
        there = [getattr(k, name) for k in keys]
        if all(c is None for c in there):
            return None
        return torch.cat(
            [torch.full_like(k.query_ids, UNKNOWN) if c is None else c for k, c in zip(keys, there, strict=True)]
        )

    return Keys(**{f.name: column(f.name) for f in fields(Keys)})


class ContrastiveTwin:
    """The definition of `Contrastive`; `temperature` is set before `loss` is called."""

    temperature: Tensor

    def __init__(
        self,
        shares: list[Embedded],
        queries: list[Tensor],
        documents: list[Tensor],
        section: ContrastiveSection,
        queues: Mapping[str, QueueRows],
    ) -> None:
        self.section = section
        cuts = [len(s.queries) for s in shares]

        def positives_first(of: list[Tensor]) -> Tensor:
            return torch.cat(
                [*(x[:b] for x, b in zip(of, cuts, strict=True)), *(x[b:] for x, b in zip(of, cuts, strict=True))]
            )

        online = section.positive_encoding == "online"
        query_keys = end_to_end([s.query_keys for s in shares])
        document_keys = end_to_end(
            [s.document_keys[:b] for s, b in zip(shares, cuts, strict=True)]
            + [s.document_keys[b:] for s, b in zip(shares, cuts, strict=True)]
        )
        self.n = sum(cuts)
        self.weights = torch.cat([s.weights for s in shares]) if shares[0].weights is not None else torch.ones(self.n)
        self.q, docs = torch.cat(queries), positives_first(documents)
        self.d = docs[: self.n]
        momentum_q = torch.cat([s.momentum_queries for s in shares])
        momentum_d = positives_first([s.momentum_documents for s in shares])
        self.target_d, self.target_q = (self.d, self.q) if online else (momentum_d[: self.n], momentum_q)
        self.query_keys, self.positive_keys = query_keys, document_keys[: self.n]
        as_row = replace(self.positive_keys, query_ids=query_keys.query_ids, document_ids=query_keys.document_ids)
        self.there = Pool.of("document", docs if online else momentum_d, document_keys)
        self.back = Pool.of("query", self.target_q, query_keys)
        if section.among_queries:
            self.there += Pool.of("query", self.q, query_keys)
        if section.among_documents:
            self.back += Pool.of("document", self.d, as_row)
        for name, rows in queues.items():
            stored = Pool.of("queue", rows.vectors.double(), rows.keys)
            if name == "queries":
                self.back += stored
            else:
                self.there += stored
        given = positives_first([torch.ones(len(s.documents)) if s.scores is None else s.scores for s in shares])
        self.scores = given.double()
        by_scores = section.soft_targets is not None and section.soft_targets.scores
        self.own_targets = self.scores[: self.n].nan_to_num(1) if by_scores else torch.ones(self.n).double()
        self.ceilings: dict[int, Tensor] = {}
        if section.false_negatives is None or section.false_negatives.reference is None:
            return
        stored = {back: [r.vectors.double() for n, r in queues.items() if (n == "queries") == back] for back in (0, 1)}
        self.references = (torch.cat([momentum_d, *stored[0]]), torch.cat([momentum_q, *stored[1]]))
        self.own_references = (momentum_q, momentum_d)

    def score(self, x: Tensor, x_length: int | None, pool: Tensor, lengths: Tensor | None) -> Tensor:
        """[n] similarities of one query and several candidates."""
        if self.section.similarity == "inner_product":
            return pool @ x
        if self.section.similarity == "squared_distance":
            return -(pool - x).square().sum(1)
        return torch.stack(
            [
                torch.stack([(x[t] @ k[:m].T).max() for t in range(x_length)]).sum()
                for k, m in zip(pool, lengths.tolist(), strict=True)
            ]
        )

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        s, lengths = self.section, self.query_keys.lengths
        length = (lambda i: None) if lengths is None else (lambda i: int(lengths[i]))
        doc_lengths = self.positive_keys.lengths
        rows, columns, correct, hardness, compared = [], [], [], [], 0
        own_there, own_back = [], []
        for i in range(self.n):
            slot = slice(i, i + 1)
            theirs = None if doc_lengths is None else doc_lengths[slot]
            own_there.append(self.score(self.q[i], length(i), self.target_d[slot], theirs)[0])
            own_back.append(self.score(self.target_q[i], length(i), self.d[slot], theirs)[0])
        for i in range(self.n):
            logits, negative, target = self._seen(i, self.q[i], self.query_keys, self.there, own_there[i], False)
            rows.append((logits, negative, target, own_there[i]))
            positive = own_there[i] / self.temperature
            if negative.any() and self.aimed(i, target):
                compared += 1
                correct.append(float(positive > logits[negative].max()))
                scale = 1 + (s.debiased.concentration if s.debiased else 0)
                weighted = logits[negative] * (1 + s.harder) * scale
                denominator = torch.cat([scale * positive[None], weighted]).logsumexp(0)
                queued = torch.tensor([kind == "queue" for kind in self.there.kind])[negative]
                hardness.append(float((weighted[queued] - denominator).detach().exp().sum()))
            if s.directions == "both":
                back = self._seen(i, self.d[i], self.positive_keys, self.back, own_there[i], True)
                columns.append((*back, own_back[i]))
        sides = [rows, columns] if columns or s.directions == "both" else [rows]
        if s.normalisation == "joint" and len(sides) == 2:
            sides = [[_both(a, b) for a, b in zip(*sides, strict=True)]]
        means = []
        for side in sides:
            total, weight = (self.q * 0).sum(), torch.zeros((), dtype=torch.float64)
            for i, (logits, negative, target, own) in enumerate(side):
                if (negative.any() or target.any()) and self.aimed(i, target):
                    total = total + self.weights[i] * self._nats(i, logits, negative, target, own, own_there)
                    weight = weight + self.weights[i]
            means.append(total / weight if weight else total)
        loss = torch.stack(means).mean()
        pooled = self.q.ndim == 2
        apart = torch.pdist(self.q.detach()).square().mul(-2).exp() if pooled else None
        return loss, {
            "loss": float(loss.detach()),
            "accuracy": sum(correct) / max(1, len(correct)),
            "alignment": float((self.q - self.d).square().sum(1).mean()) if pooled else 0.0,
            "uniformity": float(apart.mean().log()) if pooled and self.n > 1 else -math.inf if self.n > 1 else 0.0,
            "queue_hardness": sum(hardness) / max(1, len(hardness)),
            "nothing_to_compare": float(self.n - compared),
        }

    def aimed(self, i: int, target: Tensor) -> bool:
        """Whether there is a soft target that isn't 0."""
        return self.section.soft_targets is None or bool(self.own_targets[i] + target.sum() > 0)

    def _seen(
        self, i: int, x: Tensor, keys: Keys, pool: Pool, own: Tensor, back: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, which are negatives, which are positives) of row i's candidates, its own positive in none."""
        s, theirs = self.section, pool.keys
        if back and s.similarity == "max_sim":  # the query's tokens look for theirs in the document
            at = slice(i, i + 1)
            similar = torch.stack(
                [
                    self.score(q, int(n), self.d[at], self.positive_keys.lengths[at])[0]
                    for q, n in zip(pool.vectors, theirs.lengths, strict=True)
                ]
            )
        else:
            length = None if keys.lengths is None else int(keys.lengths[i])
            similar = self.score(x, length, pool.vectors, theirs.lengths)
        logits = similar / self.temperature
        own_kind = "query" if back else "document"
        elsewhere = torch.tensor(
            [
                not (k in (own_kind, "document" if back else "query") and j == i)
                for k, j in zip(pool.kind, pool.index, strict=True)
            ]
        )
        row = keys if not back else replace(keys, query_ids=self.query_keys.query_ids)
        same_document = theirs.document_ids == row.document_ids[i]
        same_query = (theirs.query_ids == row.query_ids[i]) & (theirs.query_ids != UNKNOWN)
        target = torch.zeros(len(logits), dtype=torch.bool)
        if s.positives:
            target |= same_document if s.positives.same_document else target
            target |= same_query if s.positives.same_query else target
            if s.positives.same_label:
                target |= theirs.labels == row.labels[i]
            target &= elsewhere
        negative = elsewhere & ~target
        if s.batch_negatives != "all":
            stored = torch.tensor([kind == "queue" for kind in pool.kind])
            own = (theirs.rejects == row.query_ids[i]) if not back else torch.zeros(len(logits), dtype=torch.bool)
            negative &= stored | (own if s.batch_negatives == "own" else False)
        if s.mask_same_document:
            negative &= ~same_document
        if s.mask_same_query:
            negative &= ~same_query
        if s.mask_same_label:
            negative &= theirs.labels != row.labels[i]
        for name in s.only_same:
            negative &= getattr(theirs, name) == getattr(row, name)[i]
        if s.ignore_unrelated:
            negative &= (
                (theirs.rejects == row.query_ids[i])
                if not back
                else ((row.rejects[i] == theirs.query_ids) & (theirs.query_ids != UNKNOWN))
            )
        if s.false_negatives:
            negative &= ~self._false(i, similar, target, own, back)
        if s.hardest_share < 1:
            negative = self._hardest(logits, negative, pool)
        if s.soft_targets:
            target = negative * self._soft_targets(i, row, pool, back)
        return logits, negative, target

    def _soft_targets(self, i: int, row: Keys, pool: Pool, back: bool) -> Tensor:
        """How much of a positive each candidate is for row i, one after the other."""
        soft, theirs, found = self.section.soft_targets, pool.keys, []
        for j, (kind, index) in enumerate(zip(pool.kind, pool.index, strict=True)):
            target = 0.0
            if soft.alike:
                pair = {int(row.labels[i]), int(theirs.labels[j])}
                likenesses = [alike.similarity for alike in soft.alike if pair <= set(alike.labels)]
                target = 1.0 if len(pair) == 1 else max([0.0, *likenesses])
            if soft.scores:
                query, answered = int(row.query_ids[i]), int(theirs.query_ids[j])
                rejecting = UNKNOWN if theirs.rejects is None or back else int(theirs.rejects[j])
                if query != UNKNOWN and query in (answered, rejecting):
                    known = self.scores[i] if back else self.scores[index] if kind == "document" else torch.nan
                    other = 1.0 if back or (kind == "document" and index < self.n) else 0.0
                    target = max(target, float(torch.as_tensor(known).nan_to_num(other)))
            found.append(target)
        return torch.tensor(found, dtype=torch.float64)

    def _false(self, i: int, similar: Tensor, target: Tensor, own: Tensor, back: bool) -> Tensor:
        rule = self.section.false_negatives
        if rule.reference is not None:
            return self.references[back] @ self.own_references[back][i] > rule.reference
        hardest = own
        of_batch = target & torch.tensor([kind == "document" for kind in self.there.kind]) if not back else target
        if not back and of_batch.any():
            hardest = torch.minimum(own, similar[of_batch].min())
        elif back and self.section.positives:
            hardest = self.ceilings[i]
        if not back:
            self.ceilings[i] = hardest
        bound = hardest - rule.margin if rule.margin is not None else hardest * rule.share
        return similar > bound

    def _hardest(self, logits: Tensor, negative: Tensor, pool: Pool) -> Tensor:
        queued = torch.tensor([kind == "queue" for kind in pool.kind]) & negative
        rows = queued.nonzero()[:, 0].tolist()
        kept = math.ceil(self.section.hardest_share * len(rows))
        rows.sort(key=lambda j: (-float(logits[j]), pool.index[j]))
        negative = negative.clone()
        negative[rows[kept:]] = False
        return negative

    def _nats(
        self, i: int, logits: Tensor, negative: Tensor, target: Tensor, own: Tensor, pairs: list[Tensor]
    ) -> Tensor:
        s, none = self.section, -torch.inf
        similarity = own
        if s.angular_margin:
            similarity = (own.arccos() + s.angular_margin).clamp(max=math.pi).cos()
        positive = (similarity - s.additive_margin) / self.temperature
        seen = logits[negative]
        weighted = seen + (s.harder * seen).detach()
        if s.debiased:
            beta, n = s.debiased.concentration, len(seen)
            expected = n * ((1 + beta) * seen).exp().sum() / (beta * seen).exp().sum()
            share = s.debiased.positive_share
            g = (expected - n * share * positive.exp()) / (1 - share)
            g = torch.maximum(g, n * (-1 / self.temperature).exp())
            return (positive.exp() + g).log() - positive
        if s.soft_targets:
            whole = torch.cat([positive[None], seen]).logsumexp(0)
            expected = self.own_targets[i] * positive + (target[negative] * seen).sum()
            return whole - expected / (self.own_targets[i] + target.sum())
        if s.positives:
            good = torch.cat([positive[None], logits[target]])
            whole = torch.cat([good, weighted]).logsumexp(0)
            return whole - (good.mean() if s.positives.sum == "outside" else good.logsumexp(0))
        times = 2 if s.normalisation == "joint" and s.directions == "both" else 1
        denominator = torch.cat([weighted] if s.decoupled else [*[positive[None]] * times, weighted]).logsumexp(0)
        loss = denominator - positive
        if s.label_smoothing:
            loss = loss + s.label_smoothing * (positive - torch.cat([positive[None], seen]).mean())
        if s.von_mises_fisher:
            exponentials = (torch.stack(pairs) / s.von_mises_fisher).exp()
            weight = 2 - exponentials[i] / exponentials.mean()
            loss = loss + (1 - weight) * positive
        return loss if negative.any() else torch.full_like(loss, none)


def _both(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (*(torch.cat([x, y]) for x, y in zip(a[:3], b[:3], strict=True)), a[3])
