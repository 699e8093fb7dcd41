"""A batch on many machines."""
