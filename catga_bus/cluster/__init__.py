"""Nodes that know each other: heartbeats, who lives and who does not, and the view that callers choose from."""
