"""From text to batches (paper 2.2 and 2.3): corpus, quality, tokenizer, fill-in-the-middle, packing, mixture."""
