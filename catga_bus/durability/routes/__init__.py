"""Which service handles a type, and how its keys are hashed: what callers read and nodes write."""
