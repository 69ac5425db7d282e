"""Probes: cached features of a model and labels in, scores out."""
