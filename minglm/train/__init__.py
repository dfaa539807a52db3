"""Train: one loss, one loop for pre-training, mid-training and fine-tuning, checkpoints (paper 2.4, 3.1)."""
