"""C kernels for CPUs: optional; delete this folder and everything still runs, slower (no section in the paper).

C is the third form of most operations, beside PyTorch and Triton, for float32 on a CPU.

Generation: a small model costs calls and not arithmetic, a token of the toy is about a thousand calls of PyTorch. So a
whole pass is one call (`decoder.c`, called by `minglm.inference.cpu_decoder`), and drawing the next tokens is another
(`sampling.c`).

Training: a small model's matrices are so narrow that a general library reaches 0.4 of what the processor can do, and
between the products PyTorch moves every activation through memory some thirty times a layer. So each operation of a
layer is one call for each pass (`product.c`, `experts.c`, `attention.c`, `norm.c`, `router.c`, `head.c`), and Muon's
Newton-Schulz another (`newton_schulz.c`).

`minglm.kernels.dispatch` chooses them and imports them only then.
"""
