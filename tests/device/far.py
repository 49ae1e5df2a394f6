"""A device of another type than the CPU, without hardware: PyTorch's place for backends of others, filled in Python.

Tensors of device `far` have a device type of their own, so that `.numpy()` refuses them, operations that mix them with
the CPU's raise as CUDA's do, and autograd runs their backward on a thread of the device. Their memory is the host's,
where each operation is done by the CPU's kernel: results are the CPU's to the bit. What cannot be seen here is what
comes of CUDA's own order of execution; `delayed.py` has copies that take their time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

NAME = "far"
_CPU = torch.device("cpu")
_CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# These take tensors of both kinds, as CUDA's do: copies, and indices that may be on the host.
_MIXED = ("_copy_from", "_copy_from_and_resize", "copy_", "index", "_index_put_impl_", "index_put_", "index_put")
_library = None
before_use: list[Callable[[torch.Tensor], None]] = []
"""Called with each far tensor that an operation is about to use."""


def far_device() -> torch.device:
    """Return the device, made when first asked for (once a process)."""
    global _library
    if _library is None:
        torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
        _library = torch.library.Library("_", "IMPL")
        _library.fallback(_run, "PrivateUse1")
        torch.UntypedStorage.clone = _clone
    return torch.device(NAME, 0)


def _is_far(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


_clone_of_others = torch.UntypedStorage.clone


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """`clone`, on which copies of models (`deepcopy`) rest; PyTorch's own asks for a C++ allocator."""
    if storage.device.type != NAME:
        return _clone_of_others(storage)
    size = storage.nbytes()
    host = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _CPU, size)
    return new(torch.empty(0, dtype=torch.uint8).set_(host, 0, (size,), (1,))).untyped_storage()


def used(tensor: torch.Tensor) -> None:
    """A far tensor is about to be read or written on its device."""
    for call in before_use:
        call(tensor)


def near(tensor: torch.Tensor) -> torch.Tensor:
    """Return a CPU tensor over the memory of a far one."""
    whole = tensor.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(whole.data_ptr(), _CPU, whole.nbytes())
    seen = torch.empty(0, dtype=tensor.dtype)
    return seen.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _over(storage: torch.UntypedStorage, like: torch.Tensor, offset: int) -> torch.Tensor:
    empty = torch._C._acc.create_empty_tensor((0,), like.dtype)
    set_ = torch.ops.aten.set_.source_Storage_storage_offset
    return set_.redispatch(_CPU_KEY, empty, storage, offset, like.shape, like.stride())


def new(value: torch.Tensor) -> torch.Tensor:
    """Return a far tensor with the values of a CPU one, in memory of its own."""
    size = value.untyped_storage().nbytes()
    memory = np.frombuffer(bytearray(size + 16), np.uint8)
    storage = torch._C._construct_storage_from_data_pointer(memory.ctypes.data, torch.device(NAME, 0), size)
    storage.memory = memory  # lives as long as the storage
    made = _over(storage, value, value.storage_offset())
    near(made).copy_(value)
    return made


def _resize(tensor: torch.Tensor, shape) -> torch.Tensor:
    """Give `tensor` another shape in place, and other memory where it needs more."""
    form = torch.empty(shape, dtype=tensor.dtype)
    storage, offset = tensor.untyped_storage(), tensor.storage_offset()
    if offset * tensor.element_size() + form.untyped_storage().nbytes() > storage.nbytes():
        form.view(-1)[: tensor.numel()].copy_(near(tensor).reshape(-1))
        storage, offset = new(form).untyped_storage(), 0
    set_ = torch.ops.aten.set_.source_Storage_storage_offset
    return set_.redispatch(_CPU_KEY, tensor, storage, offset, form.shape, form.stride())


def _run(operation, *args, **kwargs):
    """Do `operation` on the memory of its far tensors with the CPU's kernel."""
    seen: dict[int, torch.Tensor] = {}

    def on_cpu(value):
        if _is_far(value):
            used(value)
            view = near(value)
            seen[id(view)] = value
            return view
        if isinstance(value, torch.Tensor):
            if value.ndim and value.numel() and operation._schema.name.split("::")[1] not in _MIXED:
                raise RuntimeError(f"{operation}: tensors on {NAME} and on {value.device}")
            return value
        if isinstance(value, torch.device):
            return _CPU
        return type(value)(map(on_cpu, value)) if type(value) in (list, tuple) else value

    near_args = [on_cpu(value) for value in args]
    for at, argument in enumerate(operation._schema.arguments[: len(args)]):
        if isinstance(args[at], (int, float)) and isinstance(argument.type, torch._C.TensorType):
            # A number that was made a tensor on the way here; of no dimension, it does not decide the result's dtype.
            near_args[at] = torch.tensor(args[at], dtype=torch.float64 if isinstance(args[at], float) else None)
    near_kwargs = {name: on_cpu(value) for name, value in kwargs.items()}
    # The CPU's kernels may resize an `out` on their way: they get fresh ones.
    outs = {argument.name for argument in operation._schema.arguments if argument.is_out} & kwargs.keys()
    for out in outs:
        near_kwargs[out] = torch.empty(0, dtype=kwargs[out].dtype)
    name = operation._schema.name.split("::")[1]
    if name in ("_copy_from", "_copy_from_and_resize"):
        near_args[1].copy_(near_args[0])
        return args[1]
    if name == "set_":
        return operation.redispatch(_CPU_KEY, *args, **kwargs)
    if name == "resize_":
        return _resize(args[0], args[1])
    near_kwargs.pop("pin_memory", None)
    result = operation(*near_args, **near_kwargs)
    for out in outs:
        if kwargs[out].shape != near_kwargs[out].shape:
            _resize(kwargs[out], near_kwargs[out].shape)
        near(kwargs[out]).copy_(near_kwargs[out])
        seen[id(near_kwargs[out])] = kwargs[out]
    sources = {tensor.untyped_storage().data_ptr(): tensor for tensor in seen.values()}

    def back(value):
        if isinstance(value, torch.Tensor):
            if id(value) in seen:
                return seen[id(value)]
            source = sources.get(value.untyped_storage().data_ptr()) if value.untyped_storage().nbytes() else None
            return new(value) if source is None else _over(source.untyped_storage(), value, value.storage_offset())
        return type(value)(map(back, value)) if type(value) in (list, tuple) else value

    return back(result)
