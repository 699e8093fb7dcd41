"""A shard's bytes, durably; and the journal of what is written."""
