"""The taxonomy of constraints on an answer: seven major kinds, one file each, and their composition (paper 3.4)."""
