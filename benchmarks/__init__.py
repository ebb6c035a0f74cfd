"""Benchmarks, one file per kernel stem or question; each runs as ``python -m benchmarks.<name>``."""
