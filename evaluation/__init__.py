"""Weights to evidence: metrics, baselines, gates."""
