"""What an adapter changes, and the formulas."""
