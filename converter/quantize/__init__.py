"""Output formats: values become codes and scales."""
