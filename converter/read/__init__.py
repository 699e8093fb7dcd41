"""A base on disk or on the Hub: its files, headers, tensors and rows of tensors."""
