"""Ordered partitions: which partition a key belongs to, and which node should own each. Values in, values out."""
