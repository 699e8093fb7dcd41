"""How the tests of stores convert."""

from converter import Recipe, Resources

SMALL_SHARDS = Recipe(max_shard_size=1_000_000)
ONE_THREAD = Resources(threads=1)
SHARDS = 4
"""As many does the conversion of the stores' `inputs` make."""
