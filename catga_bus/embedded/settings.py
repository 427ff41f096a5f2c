"""What a private nats-server is told; paths and ports go on its command line instead."""

DEFAULT_MAX_PAYLOAD_BYTES = 1_048_576
"""The server's own default, and that of nearly every deployed one: what fits here fits there."""

MAX_PAYLOAD_BYTES = 67_108_864
"""The largest that nats-server accepts: its `max_pending` of 64 MiB a connection."""


def server_settings(*, max_payload_bytes: int, durable: bool) -> str:
    """Return the text of the configuration file.

    Args:
        max_payload_bytes: Largest message, headers included.
        durable: Whether the store outlives the server, so that what was acknowledged must survive a
            power cut.
    """
    # A single server has no replica to fall back on: only a synced write is a kept one. Measured
    # with 1,000 writers it costs a factor of five (27,400 to 5,700 messages a second), which
    # batches of records win back.
    sync = "sync_interval: always" if durable else "# a store that is removed in the end is synced at leisure"
    return f"""\
# Written anew at every start by catga_bus; changes made here are lost.

# A client that freezes is evicted after (ping_max + 1) * ping_interval = 1.5 s rather than the
# default 6 minutes: until then its queue groups go on sending it messages. One missed ping is
# forgiven, so that a stall of a second is no death.
ping_interval: "500ms"
ping_max: 2

# A client that does not read for this long is dropped; the default of 10 s lets one slow reader
# hold back its senders.
write_deadline: "2s"

max_payload: {max_payload_bytes}

# At most 40 MB of log.
logfile_size_limit: 10MB
logfile_max_num: 4

jetstream {{
  # Streams reserve their max_bytes from this. The default, three quarters of the disk space that is
  # free at the start, refuses on a small disk what would never have filled it.
  max_file_store: 64GB
  max_memory_store: 256MB
  {sync}
}}
"""
