"""Floor 1: the operations that cost time, one a file, each with a plain PyTorch form that the tests trust."""
