"""Exactly-once effects: the seam, its stores in SQLite and in memory, and the outbox."""
