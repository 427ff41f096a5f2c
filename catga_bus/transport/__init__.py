"""Carries bytes between processes; knows no message and no handler."""
