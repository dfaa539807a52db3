"""Cases of float8 in blocks: quantization of activations and weights, and the experts' grouped product.

Baselines: the eager form of the quantization; for the product the same one in bfloat16, and torch's float8
product with one scale a row, which needs fewer multiplications and is less exact. The difference from ours is
then that of the quantization, about 3%, and no error.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from minglm.bench.case import Case, Form, Unit
from minglm.bench.cases import normal, without_gradients
from minglm.bench.cases.grouped_product import LOADS, SHAPES, drawn
from minglm.kernels.fp8 import ACTIVATION_BLOCK, WEIGHT_BLOCK, eager, quantize, scaled_product


def quantizing(
    device: torch.device, shape: tuple[int, ...], block: tuple[int, int]
) -> dict[str, Form]:
    """Return {form: numbers and scales}."""
    x = normal(device, *shape)
    forms = {"minglm": without_gradients(quantize, x, block)}
    return forms | {"torch": without_gradients(eager.quantize, x, block)}


def product(device: torch.device, E: int, rows: int, outputs: int, inputs: int) -> dict[str, Form]:
    """Return {form: y} of inputs that are quantized beforehand."""
    x, w, _, ends_E = drawn(device, E, rows, outputs, inputs)
    xq, x_scale_blocks = quantize(x, ACTIVATION_BLOCK)
    wq, w_scale_blocks = quantize(w)
    forms: dict[str, Form] = {
        "minglm": lambda: scaled_product(xq, x_scale_blocks, wq, w_scale_blocks, ends_E)
    }
    forms["torch grouped_mm, bfloat16"] = lambda: F.grouped_mm(x, w.mT, offs=ends_E)
    if device.type == "cuda":
        x_scale = x.abs().amax(1).float() / 448
        w_scale = w.abs().amax(2).float() / 448
        x8 = (x / x_scale[:, None]).to(torch.float8_e4m3fn)
        w8 = (w / w_scale[..., None]).to(torch.float8_e4m3fn)
        forms["torch float8, by rows"] = lambda: torch._scaled_grouped_mm(
            x8, w8.mT, x_scale, w_scale, offs=ends_E, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return forms


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield quantizations and products."""
    sizes = ((20, 200), (2, 130, 40)) if smoke else ((16384, 5120), (160, 3072, 5120))
    for shape, block in zip(sizes, (ACTIVATION_BLOCK, WEIGHT_BLOCK)):
        numbers = torch.Size(shape).numel()
        name = f"{' x '.join(map(str, shape))} in blocks of {block[0]} x {block[1]}"
        forms = partial(quantizing, device, shape, block)
        yield Case(f"float8 quantisation, {name}", 0, 3 * numbers, forms)
    for outputs, inputs in ((24, 208),) if smoke else SHAPES:
        for E, rows in ((3, 10),) if smoke else LOADS:
            T = E * rows
            name = f"float8 grouped product, {E} experts, {rows} rows each, {outputs} x {inputs}"
            flops = 2 * T * outputs * inputs
            moved = T * (inputs + 2 * outputs) + E * inputs * outputs
            forms = partial(product, device, E, rows, outputs, inputs)
            yield Case(name, flops, moved, forms, Unit.FLOAT8)
