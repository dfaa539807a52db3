"""Compile, inspect and interpret Triton kernels on a machine without a GPU."""
