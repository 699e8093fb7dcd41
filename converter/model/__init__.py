"""What transformers makes of a checkpoint."""
