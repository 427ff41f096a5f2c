"""Bytes to messages and back: the gate that every payload passes first, frames, and the codec of each body type."""

from catga_bus.codec.body import DECODE_ERRORS, Body, explain
from catga_bus.codec.frames import encode_frame
from catga_bus.codec.gate import Gate, Limits
from catga_bus.codec.walks import GateError

__all__ = ["DECODE_ERRORS", "Body", "Gate", "GateError", "Limits", "encode_frame", "explain"]
