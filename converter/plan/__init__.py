"""Everything that will happen, decided before a byte is written."""
