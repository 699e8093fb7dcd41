"""A prefix of a bucket: how it is reached, and its files as a folder that can be read."""
