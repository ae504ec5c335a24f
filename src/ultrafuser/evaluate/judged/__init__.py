"""Benchmarks whose answers a judge rates."""
