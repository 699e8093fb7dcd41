"""How fast servers answer: base and adapter unmerged, merged in 16 bits, and an output. Start at `benchmark`."""
