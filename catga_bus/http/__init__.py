"""HTTP: a small server, with a thread of its own, for what machines ask of a process: does it live, is it ready."""

from catga_bus.http.address import parse_address
from catga_bus.http.server import HealthServer

__all__ = ["HealthServer", "parse_address"]
