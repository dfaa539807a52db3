"""Scores of a checkpoint: held-out tasks, held-out text, long contexts (paper 4)."""
