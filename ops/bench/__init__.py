"""Benchmarks: each prints one JSON object; `ctl bench` shows them together."""
