"""Stores: places for OUT that are no folder of this machine. `addresses` opens them."""
