"""What could not be handled: stored, shown, tried again; and events that are replayed to one service."""
