"""Documents and token shards on disk (paper 2.2)."""
