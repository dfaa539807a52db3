"""Choose which form of an operation runs: one table, and one choice for the process (no section in the paper).

    OPERATION -> Form(name, "module:function", needs=(condition, ...)), the preferred one first

The first form whose conditions hold for a call runs. The function that the model, the engine and the optimizer call
(`minglm.kernels.norm.add_norm`, for example) is `select(...)` and that call, and nothing else asks. The module of a
form is text here and is imported only when it is chosen, so Triton, the C library and a GPU are needed by those who
have them. `python -m minglm kernels` prints what the table gives on a machine, with the condition that fails.

A condition sees a `Call`, which is what a choice may depend on; the choice for each different `Call` is kept, because
training a small model makes thousands of them a second. `REFERENCES` names the plain form of each operation, which the
tests trust and the lessons show.

There is one choice for the process (`use`), as with `torch.backends`: a model that mixed implementations could not be
compared with anything.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from minglm.config.run import Kernels

MAX_HEAD_DIM = 256
"""Dimensions of a head up to which Triton's attention has tiles."""

MAX_C_MATRIX = 1 << 16
"""Numbers of a matrix, 256 KiB, up to which Newton-Schulz in C keeps all of it in a cache."""

FP8_KERNEL_BLOCKS = ((128, 128), (1, 128))
"""Blocks of a float8 scale for which there is a Triton kernel: those of weights and of activations."""


class Operation(StrEnum):
    """What the table has forms for."""

    ATTENTION = "attention"
    """Causal attention over whole sequences: training, scoring."""
    ATTENTION_TO_PROMPTS = "attention to prompts"
    """The same where texts that share prompts lie in one row: updates of reinforcement learning."""
    ATTENTION_FORWARD = "attention forward on a GPU"
    """The kernel of the forward pass inside the Triton form of attention."""
    PAGED_ATTENTION = "paged attention"
    """Attention over the engine's cache."""
    LINEAR = "linear"
    """A linear map: every projection of the model."""
    SWIGLU = "swiglu"
    """The unit of an MLP, silu(gate) * up."""
    NORM = "norm"
    """RMSNorm after the addition to the residual stream."""
    QK_NORM_ROPE = "qk norm and rope"
    """QK-norm and rotary embedding of queries and keys."""
    ROUTER = "router"
    """The experts of each token and their weights, from the router's logits."""
    SORT_BY_EXPERT = "sort by expert"
    """The pairs (token, expert) sorted by expert."""
    EXPERTS = "experts"
    """The routed experts of a layer."""
    GROUPED_PRODUCT = "grouped product"
    """The rows of each expert times its matrix, in plain PyTorch."""
    CROSS_ENTROPY = "cross-entropy"
    """Output head and weighted cross-entropy."""
    LOG_PROBABILITIES = "log-probabilities"
    """Log-probability of each target and entropy of each distribution."""
    NEWTON_SCHULZ = "newton-schulz"
    """Muon's orthogonalization of a stack of matrices."""
    SYMMETRIC_PRODUCT = "symmetric product"
    """A product that is known to be symmetric, in Newton-Schulz."""
    SCALE_MATRICES = "scaled matrices"
    """Matrices divided by their norms, in Newton-Schulz."""
    FP8_QUANTIZE = "fp8 quantize"
    """Float8 numbers with a scale for each block."""
    FP8_PRODUCT = "fp8 product"
    """The rows of each expert times its matrix, both in float8."""
    SAMPLING = "sampling"
    """The next token of each answer from its logits."""
    DRAWN_LOG_PROBABILITIES = "log-probabilities of drawn tokens"
    """The log-probability that sampling gives a token, of tokens that are known."""
    DECODER = "decoder"
    """A pass of the engine through all layers."""


class Call(NamedTuple):
    """The facts of one call that a choice may depend on. Each operation gives those that matter to it."""

    device: torch.device
    dtype: torch.dtype
    records_gradients: bool
    """Whether autograd is on (`torch.is_grad_enabled`)."""
    inference: bool
    """Whether inference mode is on."""
    head_dim: int = 128
    qk_norm: bool = True
    """Whether the model has QK-norm."""
    expert_groups: int = 1
    empty: bool = False
    """Whether there are no rows."""
    aligned: bool = True
    """Whether all rows of all matrices begin at whole 16 bytes."""
    matrix_size: int = 0
    """Numbers of one matrix of a stack."""
    product_dtype: torch.dtype = torch.float32
    gram: bool = False
    """Whether Newton-Schulz iterates on the small Gram matrix."""
    fp8_block: tuple[int, int] = (128, 128)
    plain_sampling: bool = True
    """Whether requests ask for no cut other than top-p, and for no other tokens' log-probabilities."""
    plain_model: bool = True
    """Whether the engine's model has only parts that the C decoder knows."""
    fp8_experts: bool = False
    """Whether the engine was asked for experts in float8."""


Condition = Callable[[Call], str | None]
"""Return why a form cannot run for a call; None if the condition holds."""


class Form(NamedTuple):
    """One implementation of an operation: `target` is "module:function"."""

    name: str
    target: str
    needs: tuple[Condition, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Import the module, if it is not, and return the function."""
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)

    def obstacle(self, call: Call) -> str | None:
        """Return why this form cannot run for a call; None if it can."""
        for condition in self.needs:
            reason = condition(call)
            if reason is not None:
                return reason
        return None


_chosen: Kernels = Kernels.AUTO


@functools.cache
def installed() -> bool:
    """Return whether triton can be imported; asks the file system only once."""
    return importlib.util.find_spec("triton") is not None


def has_c_library() -> bool:
    """Return whether the C kernels can run here: their folder is there, and so is a compiler that takes them."""
    try:
        build = importlib.import_module("minglm.kernels.cpu.build")
    except ModuleNotFoundError:
        return False
    return build.library() is not None


def use(kernels: str) -> None:
    """Choose the implementation for this process, a value of `minglm.config.run.Kernels`: auto, torch or triton.

    Raises ValueError for another name, and for triton where it is not installed.
    """
    global _chosen
    if kernels not in list(Kernels):
        raise ValueError(f"kernels = {kernels!r}: must be auto, torch or triton")
    if kernels == Kernels.TRITON and not installed():
        raise ValueError(
            "kernels = 'triton': triton is not installed; pip install triton, or use --kernels auto"
        )
    if kernels == Kernels.TRITON and os.environ.get("TRITON_INTERPRET") == "1":
        from minglm.kernels.toolchain import interpreter

        interpreter.patch_interpreter()
    _chosen = Kernels(kernels)
    _selected.clear()


# Conditions that ask the machine and the process


def _hardware(what: str) -> str:
    """Complete "needs ..." with whether this machine has such a thing at all."""
    missing = (
        "this machine has none" if not torch.cuda.is_available() else "these tensors are not on it"
    )
    return f"needs {what}; {missing}"


def triton(call: Call) -> str | None:
    """Require that Triton was not excluded and can run here. Float64, which is for references, is left to PyTorch.

    Raises ValueError for kernels = 'triton' on a CPU outside the interpreter, where a kernel could not run.
    """
    if _chosen == Kernels.TORCH:
        return "kernels = 'torch'"
    if call.dtype == torch.float64:
        return "float64 is computed by PyTorch"
    on_gpu = call.device.type == "cuda"
    if _chosen == Kernels.AUTO:
        if not on_gpu:
            return _hardware("a GPU")
        return None if installed() else "triton is not installed"
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "kernels = 'triton' needs a GPU; use --kernels auto, or TRITON_INTERPRET=1 for a slow test"
        )
    return None


def c_library(call: Call) -> str | None:
    """Require that C was not excluded, and float32 numbers on a CPU."""
    if _chosen != Kernels.AUTO:
        return f"kernels = '{_chosen}'"
    if call.device.type != "cpu":
        return "runs on a CPU only"
    if call.dtype != torch.float32:
        return "takes float32 only"
    return None if has_c_library() else "needs a C compiler and the folder minglm/kernels/cpu"


def hopper(call: Call) -> str | None:
    """Require a Hopper GPU (H100, H200)."""
    if call.device.type == "cuda" and torch.cuda.get_device_capability(call.device)[0] == 9:
        return None
    return _hardware("a GPU of compute capability 9.0")


def cpu(call: Call) -> str | None:
    """Require tensors that are not on a GPU."""
    return "for a CPU only" if call.device.type == "cuda" else None


# Conditions that ask what the call is for


def gradients(call: Call) -> str | None:
    """Require that autograd records."""
    return None if call.records_gradients else "pays only where gradients are wanted"


def no_gradients(call: Call) -> str | None:
    """Require that autograd does not record."""
    return "has no backward pass" if call.records_gradients else None


def inference(call: Call) -> str | None:
    """Require inference mode: no gradient can be asked for later."""
    return None if call.inference else "has no backward pass; for the engine only"


# Conditions that ask the sizes and options of the call


def half_precision(call: Call) -> str | None:
    """Require numbers of two bytes."""
    return None if call.dtype.itemsize == 2 else "takes bfloat16 and float16 only"


def head_dim_128(call: Call) -> str | None:
    """Require heads as wide as those of GLM-4.5."""
    return None if call.head_dim == 128 else f"takes heads of 128 dimensions, not {call.head_dim}"


def head_dim_in_tiles(call: Call) -> str | None:
    """Require heads that are no wider than the widest tile."""
    if call.head_dim <= MAX_HEAD_DIM:
        return None
    return f"takes heads of up to {MAX_HEAD_DIM} dimensions, not {call.head_dim}"


def some_rows(call: Call) -> str | None:
    """Require at least one row: a kernel is not launched for none."""
    return "there are no rows" if call.empty else None


def model_has_qk_norm(call: Call) -> str | None:
    """Require a model that norms queries and keys."""
    return None if call.qk_norm else "the model has no QK-norm"


def one_expert_group(call: Call) -> str | None:
    """Require that all experts compete."""
    return None if call.expert_groups == 1 else "takes one group of experts"


def grouped_mm_takes(call: Call) -> str | None:
    """Require what `torch.nn.functional.grouped_mm` takes: on a CPU not float64, and rows at whole 16 bytes."""
    if call.device.type == "cuda":
        return None
    if call.dtype == torch.float64:
        return "does not take float64"
    return None if call.aligned else "takes rows that begin at whole 16 bytes"


def float32_products(call: Call) -> str | None:
    """Require products in float32."""
    return None if call.product_dtype is torch.float32 else "computes in float32"


def standard_iteration(call: Call) -> str | None:
    """Require that Newton-Schulz works on the matrices themselves."""
    return "has no Gram form" if call.gram else None


def matrix_in_cache(call: Call) -> str | None:
    """Require matrices that stay in a core's cache, and are not empty."""
    if call.matrix_size <= 0:
        return "the matrices are empty"
    return None if call.matrix_size <= MAX_C_MATRIX else "the matrices do not fit in a core's cache"


def fp8_block_has_kernel(call: Call) -> str | None:
    """Require the block of weights or of activations."""
    return None if call.fp8_block in FP8_KERNEL_BLOCKS else "takes blocks of 128 x 128 and 1 x 128"


def plain_sampling(call: Call) -> str | None:
    """Require requests that ask for no more than temperature and top-p."""
    return None if call.plain_sampling else "takes temperature and top-p only"


def plain_model(call: Call) -> str | None:
    """Require a model that has only parts that the C decoder knows."""
    return None if call.plain_model else "the model has parts that it does not know"


def fp8_experts_wanted(call: Call) -> str | None:
    """Require that the engine was asked for experts in float8."""
    return None if call.fp8_experts else "experts = 'float8' was not asked for"


# The table. Targets are text: nothing is imported before it is chosen.

FORMS: dict[Operation, tuple[Form, ...]] = {
    Operation.ATTENTION: (
        Form(
            "triton",
            "minglm.kernels.attention.triton_layer:flash_attention_triton",
            (head_dim_in_tiles, triton),
        ),
        Form("c", "minglm.kernels.cpu.attention:attention_c", (gradients, c_library)),
        Form("chunked", "minglm.kernels.attention.chunked:chunked_attention"),
    ),
    Operation.ATTENTION_TO_PROMPTS: (
        Form("c", "minglm.kernels.cpu.attention:attention_to_prompts_c", (gradients, c_library)),
        Form("expanded", "minglm.kernels.attention.shared:expanded"),
    ),
    Operation.ATTENTION_FORWARD: (
        Form(
            "gluon",
            "minglm.kernels.attention.gluon_forward:forward_gluon",
            (hopper, half_precision, head_dim_128),
        ),
        # Without conditions: only the Triton form of attention, whose conditions hold then, asks.
        Form("triton", "minglm.kernels.attention.triton_forward:forward_triton"),
    ),
    Operation.PAGED_ATTENTION: (
        Form("triton", "minglm.kernels.attention.paged:in_place", (head_dim_in_tiles, triton)),
        Form("gathered", "minglm.kernels.attention.paged:gathered"),
    ),
    Operation.LINEAR: (
        Form("c", "minglm.kernels.cpu.linear:linear_c", (gradients, matrix_in_cache, c_library)),
        Form("eager", "minglm.kernels.linear.eager:linear"),
    ),
    Operation.SWIGLU: (
        Form("c", "minglm.kernels.cpu.linear:swiglu_c", (gradients, c_library)),
        Form("eager", "minglm.kernels.swiglu.eager:swiglu"),
    ),
    Operation.NORM: (
        Form("triton", "minglm.kernels.norm.triton_kernel:add_norm_triton", (triton,)),
        Form("c", "minglm.kernels.cpu.norm:add_norm_c", (gradients, c_library)),
        Form("fused", "minglm.kernels.norm.fused:add_norm_fused", (cpu, gradients)),
        Form("eager", "minglm.kernels.norm.eager:norm"),
    ),
    Operation.QK_NORM_ROPE: (
        Form("triton", "minglm.kernels.qk_norm_rope.triton_kernel:qk_norm_rope_triton", (triton,)),
        Form(
            "c",
            "minglm.kernels.cpu.norm:qk_norm_rope_c",
            (gradients, model_has_qk_norm, c_library),
        ),
        Form(
            "fused",
            "minglm.kernels.qk_norm_rope.fused:qk_norm_rope_fused",
            (cpu, gradients, model_has_qk_norm),
        ),
        Form("eager", "minglm.kernels.qk_norm_rope.eager:qk_norm_rope"),
    ),
    Operation.ROUTER: (
        Form(
            "triton", "minglm.kernels.router.triton_kernel:route_triton", (one_expert_group, triton)
        ),
        Form("c", "minglm.kernels.cpu.router:route_c", (gradients, one_expert_group, c_library)),
        Form("eager", "minglm.kernels.router.eager:route"),
    ),
    Operation.SORT_BY_EXPERT: (
        Form("triton", "minglm.kernels.router.triton_kernel:group_by_expert_triton", (triton,)),
        Form("eager", "minglm.kernels.router.eager:group_by_expert"),
    ),
    Operation.EXPERTS: (
        Form("triton", "minglm.kernels.experts.triton_layer:experts_triton", (some_rows, triton)),
        Form(
            "no gradient",
            "minglm.kernels.experts.no_gradient:experts_without_gradient",
            (cpu, no_gradients),
        ),
        Form("c", "minglm.kernels.cpu.experts:experts_c", (gradients, matrix_in_cache, c_library)),
        Form("grouped", "minglm.kernels.experts.grouped:experts_grouped"),
    ),
    Operation.GROUPED_PRODUCT: (
        Form(
            "torch grouped_mm",
            "minglm.kernels.experts.grouped:torch_grouped_mm",
            (grouped_mm_takes,),
        ),
        Form("loop", "minglm.kernels.experts.grouped:loop_over_experts"),
    ),
    Operation.CROSS_ENTROPY: (
        Form("triton", "minglm.kernels.cross_entropy.chunked:cross_entropy_gpu", (triton,)),
        Form("c", "minglm.kernels.cpu.head:cross_entropy_c", (gradients, c_library)),
        Form("chunked", "minglm.kernels.cross_entropy.chunked:cross_entropy_chunked"),
    ),
    Operation.LOG_PROBABILITIES: (
        Form(
            "triton",
            "minglm.kernels.cross_entropy.triton_kernel:log_probabilities_triton",
            (some_rows, triton),
        ),
        Form("c", "minglm.kernels.cpu.head:log_probabilities_c", (gradients, c_library)),
        Form("eager", "minglm.kernels.cross_entropy.eager:log_probabilities"),
    ),
    Operation.NEWTON_SCHULZ: (
        Form(
            "c",
            "minglm.kernels.cpu.newton_schulz:newton_schulz_c",
            (c_library, float32_products, standard_iteration, matrix_in_cache),
        ),
        Form("eager", "minglm.kernels.newton_schulz.eager:newton_schulz"),
    ),
    Operation.SYMMETRIC_PRODUCT: (
        Form(
            "triton",
            "minglm.kernels.newton_schulz.triton_kernel:symmetric_product_triton",
            (triton,),
        ),
        Form("eager", "minglm.kernels.newton_schulz.eager:symmetric_product_eager"),
    ),
    Operation.SCALE_MATRICES: (
        Form("triton", "minglm.kernels.newton_schulz.triton_kernel:scaled_triton", (triton,)),
        Form("eager", "minglm.kernels.newton_schulz.eager:scaled_eager"),
    ),
    Operation.FP8_QUANTIZE: (
        Form(
            "triton",
            "minglm.kernels.fp8.triton_kernel:quantize_triton",
            (fp8_block_has_kernel, triton),
        ),
        Form("eager", "minglm.kernels.fp8.eager:quantize"),
    ),
    Operation.FP8_PRODUCT: (
        Form(
            "triton", "minglm.kernels.fp8.triton_kernel:scaled_product_triton", (some_rows, triton)
        ),
        Form("eager", "minglm.kernels.fp8.eager:scaled_product"),
    ),
    # The last three have their forms in the engine's folder, which is above this one: the table only names them.
    Operation.SAMPLING: (
        Form(
            "c", "minglm.inference.sampling:sample_with_c", (plain_sampling, inference, c_library)
        ),
        Form("torch", "minglm.inference.sampling:sample_with_torch"),
    ),
    Operation.DRAWN_LOG_PROBABILITIES: (
        Form("c", "minglm.kernels.cpu.sampling:log_probabilities_c", (inference, c_library)),
        Form("torch", "minglm.inference.sampling:drawn_log_probabilities_with_torch"),
    ),
    Operation.DECODER: (
        Form("fp8 experts", "minglm.inference.fp8_experts:Fp8Decoder", (fp8_experts_wanted,)),
        Form("c", "minglm.inference.cpu_decoder:CpuDecoder", (plain_model, inference, c_library)),
        Form("model", "minglm.inference.pages:PagedCache"),
    ),
}

REFERENCES: dict[Operation, str] = {
    Operation.ATTENTION: "minglm.kernels.attention.eager:attention",
    Operation.ATTENTION_TO_PROMPTS: "minglm.kernels.attention.eager:attention_to_prompts",
    Operation.PAGED_ATTENTION: "minglm.kernels.attention.eager:attend_slots",
    Operation.LINEAR: "minglm.kernels.linear.eager:linear",
    Operation.SWIGLU: "minglm.kernels.swiglu.eager:swiglu",
    Operation.NORM: "minglm.kernels.norm.eager:norm",
    Operation.QK_NORM_ROPE: "minglm.kernels.qk_norm_rope.eager:qk_norm_rope",
    Operation.ROUTER: "minglm.kernels.router.eager:route",
    Operation.SORT_BY_EXPERT: "minglm.kernels.router.eager:group_by_expert",
    Operation.EXPERTS: "minglm.kernels.experts.eager:experts_loop",
    Operation.CROSS_ENTROPY: "minglm.kernels.cross_entropy.eager:cross_entropy",
    Operation.LOG_PROBABILITIES: "minglm.kernels.cross_entropy.eager:log_probabilities",
    Operation.NEWTON_SCHULZ: "minglm.kernels.newton_schulz.eager:newton_schulz",
    Operation.FP8_QUANTIZE: "minglm.kernels.fp8.eager:quantize",
    Operation.FP8_PRODUCT: "minglm.kernels.fp8.eager:scaled_product",
    Operation.SAMPLING: "minglm.inference.sampling:sample",
    Operation.DRAWN_LOG_PROBABILITIES: "minglm.inference.sampling:drawn_log_probabilities_with_torch",
    Operation.DECODER: "minglm.inference.pages:PagedCache",
}

_selected: dict[tuple[Kernels, Operation, Call], Form] = {}


def call_of(tensor: torch.Tensor, **facts: Any) -> Call:
    """Return the facts of a call with this tensor, in this thread's autograd mode; `facts` as in `Call`."""
    return Call(
        tensor.device,
        tensor.dtype,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        **facts,
    )


def form_for(operation: Operation, call: Call) -> Form:
    """Return the first form of an operation that can run for a call."""
    for form in FORMS[operation]:
        if form.obstacle(call) is None:
            return form
    raise AssertionError(f"no form of {operation} is without conditions")


def select(operation: Operation, tensor: torch.Tensor, **facts: Any) -> Callable[..., Any]:
    """Return the function that computes an operation for this tensor; `facts` as in `Call`."""
    if operation in _stand_ins:
        return _stand_ins[operation]
    key = (_chosen, operation, call_of(tensor, **facts))
    form = _selected.get(key)
    if form is None:
        form = form_for(operation, key[2])
        _selected[key] = form
    return _load(form.target)


_stand_ins: dict[Operation, Callable[..., Any]] = {}


@contextlib.contextmanager
def stand_ins(functions: Mapping[Operation, Callable[..., Any]]) -> Iterator[None]:
    """Let these functions compute their operations, whatever the table says: for a rehearsal without numbers."""
    _stand_ins.update(functions)
    try:
        yield
    finally:
        _stand_ins.clear()


def selected_name(operation: Operation, tensor: torch.Tensor, **facts: Any) -> str:
    """Return the name of the form that `select` takes."""
    return form_for(operation, call_of(tensor, **facts)).name


_modules: dict[str, tuple[Any, str]] = {}


def _load(target: str) -> Callable[..., Any]:
    """Return the function of a target. The module is kept, and the function looked up in it as an import would."""
    found = _modules.get(target)
    if found is None:
        module, function = target.split(":")
        found = (importlib.import_module(module), function)
        _modules[target] = found
    return getattr(*found)
