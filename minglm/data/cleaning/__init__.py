"""Steps of cleaning: what is removed from the corpus, and what is repeated (paper 2.2)."""
