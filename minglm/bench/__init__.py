"""Measure speed beside named baselines: generation, training steps, kernels, compiled machine code."""
