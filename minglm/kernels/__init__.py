"""Floor 1: the operations that cost time, one a file, each with a plain PyTorch form that the tests trust.

`x.py` holds the plain form and the choice between forms (`minglm.kernels.dispatch`); `x_triton.py` the GPU kernels, and
the configurations in which they are compiled as a list `SPECS`.
"""
