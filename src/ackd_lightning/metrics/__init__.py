"""Reads checkpoints and features; trains nothing."""
