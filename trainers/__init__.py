"""Batches to weights: the step, the engine, the queue, the momentum encoder, checkpoints."""
