"""A model run one decoder layer at a time."""
