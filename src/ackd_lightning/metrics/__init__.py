"""Measurements of trained networks from their logits and embeddings; no training, and no files are read."""
