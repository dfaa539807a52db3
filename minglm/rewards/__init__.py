"""Rewards that are no environment's own: detectors of faults of form, and reward shaping (paper 3.4)."""
