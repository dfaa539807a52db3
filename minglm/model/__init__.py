"""Floor 2: the network of GLM-4.5 (paper 2.1), one component a file."""
