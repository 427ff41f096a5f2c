"""What OpenTelemetry sees of the bus; the only room that imports it."""
