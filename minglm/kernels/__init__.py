"""The operations that cost time: a folder an operation, and one table that says which form of it runs.

Each folder's `__init__.py` exports the functions that the model, the engine and the optimizer call. `eager.py` is the
reference in plain PyTorch, with the equation; the other files are faster forms: `fused`, `grouped` or `chunked` in
PyTorch, `triton_*` and `gluon_*` for GPUs. `dispatch.py` has the table of forms with their conditions. `cpu/` is C for
CPUs, and optional; `toolchain/` compiles and interprets the GPU kernels without a GPU.
"""
