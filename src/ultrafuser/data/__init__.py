"""Rows, sources, balanced batches."""
