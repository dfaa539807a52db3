"""Watch a step on tensors without numbers: its collectives, its memory, and answers where a number is asked for.

A fake world (`torch.testing._internal.distributed.fake_pg`) has any number of ranks in one process; their
collectives return at once. Tensors are fake too: they have shapes and no numbers. Where the program asks for
a number, `Watch`
answers: experts have equal loads, every target counts, a scalar is one.
"""

import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
NO_TRAFFIC = ("wait_tensor", "wrap_tensor_autograd", "barrier", "monitored_barrier")


class CollectiveKind(NamedTuple):
    """Which collective, over how many ranks."""

    name: str
    """gather, reduce-scatter, all-reduce, all-to-all, broadcast."""
    ranks: int


NAMES = {
    "allgather_base": "gather",
    "allgather": "gather",
    "all_gather_into_tensor": "gather",
    "reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
}
"""What PyTorch's operators are called here, without underscores at their ends."""


class Watch(TorchDispatchMode):
    """Counts collectives and memory, and answers questions for numbers.

    counts, bytes: of collectives by kind; bytes are those of the larger of what a rank gives and what it
    gets. held, peak: bytes of all storages that are alive, and the most there were since `begin`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[CollectiveKind] = Counter()
        self.bytes: Counter[CollectiveKind] = Counter()
        self.held = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "Watch":
        """Watch storages that are resized too: sharding frees gathered weights so."""
        watch = self
        resize = self._resize

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            watch._size(storage)
            return result

        setattr(torch.UntypedStorage, "resize_", watched)  # noqa: B010 -- its type is another
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop watching."""
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize

    def begin(self) -> None:
        """Forget collectives and peak: what follows is another part of the step."""
        self.counts.clear()
        self.bytes.clear()
        self.peak = self.held

    def _size(self, storage: torch.UntypedStorage) -> None:
        """Note the size of a storage, whose bytes are held until it is gone."""
        key = id(storage)
        if key not in self._sizes:
            weakref.finalize(storage, self._gone, key)
        self.held += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.held)

    def _gone(self, key: int) -> None:
        """Forget a storage."""
        self.held -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count or answer, or let the operation go on."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as operations on the rows of this rank
        kwargs = kwargs or {}
        name = func._schema.name
        namespace, _, short = name.partition("::")
        if namespace in NAMESPACES:
            self._count(short, args)
        elif name == "aten::bincount":
            return _equal_loads(*args, **kwargs)
        elif name == "aten::nonzero":
            return torch.arange(args[0].numel(), device=args[0].device)[:, None]
        elif name == "aten::index":
            args = (args[0], [_all_of(index) for index in args[1]], *args[2:])
        elif name == "aten::_local_scalar_dense" and _is_fake(args[0]):
            return 1.0 if args[0].dtype.is_floating_point else 1
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if _is_fake(tensor):
                self._size(tensor.untyped_storage())
        return result

    def _count(self, short: str, args: tuple[Any, ...]) -> None:
        """Count a collective with its bytes."""
        operator = short.strip("_")
        if operator in NO_TRAFFIC:
            return
        name = NAMES.get(operator, operator)
        kind = CollectiveKind(name, _ranks(args))
        sizes = [_bytes(arg) for arg in args]
        self.counts[kind] += 1
        self.bytes[kind] += max(sizes, default=0)


def _is_fake(tensor: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def _all_of(index: Any) -> Any:
    """Turn a mask of one axis into the indices of all its positions."""
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.ndim == 1:
        return torch.arange(len(index), device=index.device)
    return index


def _equal_loads(
    indices: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0
) -> torch.Tensor:
    """Answer how often each index occurs: equally often."""
    return indices.new_full((minlength,), indices.numel() // max(1, minlength))


def _ranks(args: tuple[Any, ...]) -> int:
    """Return the ranks of the group of a collective: the operators name it in different ways."""
    import torch.distributed as dist

    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(arg).size()
            except RuntimeError:  # an object of another class, such as the kind of a reduction
                continue
        if isinstance(arg, str):
            try:
                return dist.distributed_c10d._resolve_process_group(arg).size()  # type: ignore[arg-type]
            except (ValueError, LookupError, RuntimeError):  # the name of a reduction
                continue
    return 1


def _bytes(arg: Any) -> int:
    """Count the bytes of a tensor, or of all tensors of a list."""
    if isinstance(arg, torch.Tensor):
        return arg.numel() * arg.itemsize
    if isinstance(arg, list | tuple):
        return sum(_bytes(value) for value in arg)
    return 0
