"""A private nats-server: started on first use, gone with the process that started it."""

from catga_bus.embedded.binary import find_server_binary
from catga_bus.embedded.server import EmbeddedServer

__all__ = ["EmbeddedServer", "find_server_binary"]
