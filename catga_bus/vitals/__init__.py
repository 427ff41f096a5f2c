"""Vitals: what the process costs, and how short of memory and time for work it is."""

from catga_bus.vitals.memory import MemoryUse
from catga_bus.vitals.signs import Vitals, VitalSigns

__all__ = ["MemoryUse", "VitalSigns", "Vitals"]
