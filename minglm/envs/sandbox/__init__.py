"""A sandbox for programs that a model wrote: `pool` is the outside, `jail` the inside (paper 3.2, 3.5)."""
