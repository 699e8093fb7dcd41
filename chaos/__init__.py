"""Faults on purpose: kill, fill, break and cut the power of conversions, and look at what they leave.

`make chaos` runs all of them, `python -m chaos --short` some.
"""
