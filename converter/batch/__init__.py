"""Many adapters in one pass over the base."""
