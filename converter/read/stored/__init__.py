"""Quantized bases: how one weight lies on disk, one file a scheme."""
