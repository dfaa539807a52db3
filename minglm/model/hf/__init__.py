"""Released checkpoints of Hugging Face, in and out: config.json, names of tensors, files (paper Table 1)."""
