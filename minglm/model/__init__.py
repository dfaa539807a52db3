"""The network of GLM-4.5, one component a file (paper 2.1)."""
