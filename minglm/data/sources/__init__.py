"""Where documents come from: your own files, Python's library, synthetic text (paper 2.2, 2.3)."""
