"""Ordered partitions: which partition a key belongs to, and which node should own each partition. Pure: values in, values out."""
