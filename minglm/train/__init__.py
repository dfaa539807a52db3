"""Floor 3: one training loop for pre-training, mid-training and supervised fine-tuning, and its checkpoints."""
