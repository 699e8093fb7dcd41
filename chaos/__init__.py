"""Faults on purpose: kill conversions, fill or break their disk, cut its power, and check what is left.

`make chaos` runs all of them, `python -m chaos --short` some.
"""
