"""What outlives processes: commands, durable events, dead letters, the inbox, and the streams that they lie in."""
