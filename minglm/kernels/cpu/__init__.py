"""C kernels for CPUs: optional; delete this folder and everything still runs, slower (no section in the paper).

C is the third form of a few operations, beside PyTorch and Triton, for float32 on a CPU where no gradient can be asked
for. Generation with a small model costs calls and not arithmetic: a token of the toy is about a thousand calls of
PyTorch. So a whole pass is one call (`decoder.c`, called by `minglm.inference.cpu_decoder`), drawing the next tokens is
another (`sampling.c`), and Muon's Newton-Schulz a third (`newton_schulz.c`). `minglm.kernels.dispatch` chooses them and
imports them only then.
"""
