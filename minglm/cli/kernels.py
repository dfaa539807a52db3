"""Print which form of each operation runs on this machine, and why the others do not: the verb `kernels`.

Two uses, training (autograd on) and generation (the engine's inference mode), in two dtypes. The table of
forms and conditions is that of `minglm.kernels.dispatch`, so what is printed is what is chosen.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from minglm.config.run import Kernels

if TYPE_CHECKING:  # torch is imported when the verb runs, not for its --help
    from minglm.kernels.dispatch import Call, Form, Operation

SMALL_MATRIX = 64 * 64
"""Numbers of the matrices for which Newton-Schulz is asked: those of a toy."""


class Use(NamedTuple):
    """A column of the table."""

    name: str
    generates: bool
    call: Call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kernels`."""
    choices = [str(choice) for choice in Kernels]
    parser.add_argument(
        "--kernels", default="auto", choices=choices, help="the choice of a run (RunConfig.kernels)"
    )


def main(args: argparse.Namespace) -> None:
    """Print the machine, the form of each operation, and what keeps the others from running."""
    from minglm.kernels import dispatch

    dispatch.use(args.kernels)
    uses = _uses()
    print(_machine(args.kernels))
    print()
    print(_table(uses))
    print()
    for operation, forms in dispatch.FORMS.items():
        print(operation)
        for form in forms:
            for line in _explain(operation, form, uses):
                print(f"    {form.name:18} {line}")


def _machine(kernels: str) -> str:
    """Describe what the conditions ask of this machine."""
    import torch

    from minglm.kernels.dispatch import has_c_library, installed

    gpu = "no GPU"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    triton = "triton is installed" if installed() else "triton is not installed"
    c = "the C library runs" if has_c_library() else "no C library"
    return f"kernels = {kernels}; {gpu}; {triton}; {c}"


def _uses() -> list[Use]:
    """Return the calls that are asked about."""
    import torch

    from minglm.kernels.dispatch import Call

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    uses = []
    for generates in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            what = "generation" if generates else "training"
            call = Call(
                device,
                dtype,
                records_gradients=not generates,
                inference=generates,
                matrix_size=SMALL_MATRIX,
            )
            uses.append(Use(f"{what}, {str(dtype).removeprefix('torch.')}", generates, call))
    return uses


def _applies(operation: Operation, use: Use) -> bool:
    """Return whether an operation occurs in this use."""
    from minglm.kernels.dispatch import Operation as Op

    engine_only = (Op.PAGED_ATTENTION, Op.FP8_QUANTIZE, Op.FP8_PRODUCT, Op.SAMPLING, Op.DECODER)
    training_only = (
        Op.ATTENTION_TO_PROMPTS,
        Op.CROSS_ENTROPY,
        Op.NEWTON_SCHULZ,
        Op.SYMMETRIC_PRODUCT,
        Op.SCALE_MATRICES,
    )
    if use.generates:
        return operation not in training_only
    return operation not in engine_only


def _chosen(operation: Operation, use: Use) -> Form | None:
    """Return the form that runs; None where no form can."""
    from minglm.kernels.dispatch import FORMS

    for form in FORMS[operation]:
        if form.obstacle(use.call) is None:
            return form
    return None


def _table(uses: list[Use]) -> str:
    """Return one line for each operation, with the form that runs in each use."""
    from minglm.kernels.dispatch import Operation

    lines = ["  ".join([f"{'operation':26}", *(f"{use.name:20}" for use in uses)]).rstrip()]
    for operation in Operation:
        cells = []
        for use in uses:
            form = _chosen(operation, use)
            name = form.name if form is not None and _applies(operation, use) else "-"
            cells.append(f"{name:20}")
        lines.append("  ".join([f"{operation:26}", *cells]).rstrip())
    return "\n".join(lines)


def _explain(operation: Operation, form: Form, uses: list[Use]) -> list[str]:
    """Return where a form runs, and for each reason why it does not, in which uses."""
    lines: dict[str, list[str]] = {}
    applicable = [use for use in uses if _applies(operation, use)]
    for use in applicable:
        chosen = _chosen(operation, use)
        if chosen is form:
            line = "runs"
        else:
            first = "no form" if chosen is None else chosen.name
            line = form.obstacle(use.call) or f"could run, but {first} comes first"
        lines.setdefault(line, []).append(use.name)
    if len(lines) == 1:
        return list(lines)
    return [f"{line} ({'; '.join(names)})" for line, names in lines.items()]
