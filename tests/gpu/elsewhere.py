"""A pretended device: it computes on the CPU, and is as strict as a card is about where tensors are.

Tensors on ``elsewhere`` hold ordinary ones and run every operation on these, so that results are real. Refused are, as
CUDA and MPS refuse them: an operation on tensors of both devices (scalars and indices excepted), and float64, which MPS
does not have. What it cannot show is whether a card's own kernels exist and are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
TAKES_INDICES = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
}  # fmt: skip


class Away(torch.Tensor):
    """A tensor on the pretended device; ``here`` holds its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Away:
        made: Away = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.here = here
        return made

    def __init__(self, here: torch.Tensor) -> None: ...

    def __repr__(self) -> str:
        return f"Away({self.here})"

    def data_ptr(self) -> int:
        return self.untyped_storage().data_ptr() + self.storage_offset() * self.element_size()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _sent, (self.here.detach(),)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _sent(here: torch.Tensor) -> torch.Tensor:
    """A tensor as it was saved, on the device again."""
    return Away(here)


class _Everywhere(TorchDispatchMode):
    """Operations that make tensors name their device, and take none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """``torch.tensor`` and its like fill a tensor beneath the dispatcher: on the CPU here, and then it moves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.tolist and _is_away(args[0]):
            return args[0].here.tolist()
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    away = any(isinstance(tensor, Away) for tensor in tensors)
    if away and func not in MOVES:
        _refuse_mixed(func, args, kwargs)
    asked = kwargs.get("device")
    if asked is not None:
        away = torch.device(asked).type == NAME
    inner = tree_map(_here, kwargs)
    if asked is not None and away:
        inner["device"] = torch.device("cpu")
    out = func(*tree_map(_here, args), **inner)
    if not away or (func in MOVES and asked is None and not isinstance(args[0], Away)):
        return args[0] if func is aten.copy_.default else out
    wrapped = tree_map(lambda leaf: _away(leaf, func) if isinstance(leaf, torch.Tensor) else leaf, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if any(_is_away(t) for t in tensors) else wrapped


def _refuse_mixed(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    looked = args[:1] + args[2:] if func in TAKES_INDICES else args
    for leaf in tree_leaves((looked, kwargs)):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Away) and leaf.ndim:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {NAME} and {leaf.device}")


def _is_away(leaf: Any) -> bool:
    return isinstance(leaf, Away)


def _here(leaf: Any) -> Any:
    return leaf.here if isinstance(leaf, Away) else leaf


def _away(tensor: torch.Tensor, func: Any) -> Away:
    if tensor.dtype == torch.float64:
        raise TypeError(f"{func}: {NAME} has no float64, as MPS has none")
    return Away(tensor)


class _Backend(_DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def register() -> torch.device:
    """Make the device known to torch; once a process, and for good."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    torch.serialization.add_safe_globals([_sent])
    address = torch.UntypedStorage.data_ptr

    def addressed(storage: torch.UntypedStorage) -> int:
        """What tells storages apart when tensors are saved: these have no memory of their own."""
        return storage._cdata if storage.device.type == NAME else address(storage)

    torch.UntypedStorage.data_ptr = addressed  # type: ignore[method-assign]
    return torch.device(NAME, 0)


@contextmanager
def open_device() -> Iterator[None]:
    """Inside, tensors can be made on it."""
    # Modes are a thread's own, so the backward pass stays in this one.
    with _Made(), _Everywhere(), torch.autograd.set_multithreading_enabled(False):
        yield
