"""The streams of a service: planned, created or compared, and changed only on demand."""
