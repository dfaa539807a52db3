"""Compare two implementations module by module, to find where they first differ (paper 2.1).

    python -m minglm.model.parity FOLDER     a released checkpoint: minglm beside transformers

    error of a module = largest difference of its outputs / largest output of the reference

A wrong logit says that something is wrong; this says what. Both models compute the same tokens, and every
module that has the same name in both is compared. The first one whose error is above the tolerance is at
fault, or it uses something that is not a module (a wrong rotation shows in `o_proj`, wrong experts in `mlp`).
A router's output is compared as a table of weights, tokens by experts, so that the order of the chosen
experts does not matter.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minglm.model.glm import GLM

FLOAT32 = 1e-4  # tolerance: float32 rounds at 6e-8, and the errors of a hundred layers add up


@dataclass(frozen=True)
class ModuleError:
    """The relative error of one module."""

    name: str
    error: float


def _comparable(output: Any) -> Tensor:
    """Return the tensor that a module's output is compared by, flat and float64."""
    values = output if isinstance(output, tuple) else (output,)
    tensors = [value for value in values if isinstance(value, Tensor)]
    chosen_TK = next((tensor for tensor in tensors if tensor.dtype == torch.int64), None)
    if chosen_TK is None:
        return tensors[0].detach().double().flatten()
    # A router: chosen experts (T, K), their weights (T, K), and the scores of all experts (T, E).
    weights_TK = next(
        tensor for tensor in tensors if tensor is not chosen_TK and tensor.shape == chosen_TK.shape
    )
    experts = max(tensor.shape[-1] for tensor in tensors)
    table_TE = weights_TK.new_zeros(len(chosen_TK), experts).scatter_add(1, chosen_TK, weights_TK)
    return table_TE.detach().double().flatten()


@torch.no_grad()
def outputs(model: nn.Module, tokens_BS: Tensor) -> dict[str, Tensor]:
    """Return {name: flat output} of every module that is called in one pass, in the order of the calls."""
    recorded: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # A hook that returns something would replace the output. A module that is called twice keeps the first.
            recorded.setdefault(name, _comparable(output))

        return hook

    handles = []
    for name, module in model.named_modules():
        if name not in ("", "model"):
            handles.append(module.register_forward_hook(record(name)))
    try:
        model(tokens_BS)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def compare(model: nn.Module, reference: nn.Module, tokens_BS: Tensor) -> list[ModuleError]:
    """Return the error of each module that both models have, in the order in which `model` computes.

    model, reference: a GLM and Hugging Face's model, or any two with modules of the same names. tokens int64 (B, S).
    """
    ours = outputs(model, tokens_BS)
    theirs = outputs(reference, tokens_BS)
    errors = []
    for name, output in ours.items():
        expected = theirs.get(name)
        if expected is None or expected.numel() != output.numel():
            continue
        largest = expected.abs().max().clamp(min=1e-30)
        difference = (output - expected).abs().max()
        errors.append(ModuleError(name, (difference / largest).item()))
    return errors


def first_difference(errors: Sequence[ModuleError], tolerance: float = FLOAT32) -> str | None:
    """Return the name of the first module whose error is NaN or above the tolerance; None if there is none."""
    for row in errors:
        if not row.error <= tolerance:
            return row.name
    return None


def load_pair(folder: str | Path) -> tuple[GLM, nn.Module]:
    """Load a released checkpoint in minglm and in transformers, both in float32.

    Needs `pip install minglm[hf]`.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("this compares with transformers: pip install 'minglm[hf]'") from None
    model = GLM.from_pretrained(folder, torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.eval(), reference.eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Compare a folder on random tokens; print a line for each module, then the first that differs."""
    parser = argparse.ArgumentParser(prog="python -m minglm.model.parity", description=main.__doc__)
    parser.add_argument(
        "folder", help="folder of a released checkpoint that fits into memory twice"
    )
    parser.add_argument(
        "--positions", type=int, default=16, help="length of the two rows of tokens"
    )
    parser.add_argument("--tolerance", type=float, default=FLOAT32)
    options = parser.parse_args(argv)
    model, reference = load_pair(options.folder)
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(model.config.vocab_size, (2, options.positions), generator=generator)
    errors = compare(model, reference, tokens_BS)
    for row in errors:
        print(f"{row.error:8.1e}  {row.name}")
    first = first_difference(errors, options.tolerance)
    print(f"first difference above {options.tolerance:g}: {first}")


if __name__ == "__main__":
    main()
