"""Benchmarks: what a request costs, beside other ways to send one, and what a node costs over time.

Run `python -m benchmarks --help`; `README.md` in this folder says what the numbers mean and what
they do not.
"""
