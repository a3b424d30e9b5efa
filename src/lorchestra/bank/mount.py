"""``Bank``: adapters mounted on a model, mixed per row by coefficients; the base stays as it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.bank.layer import BankLayer, Selection, Switch, TrainableMember
from lorchestra.errors import AdapterError

Coefficients = Mapping[str, "float | Tensor"]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out_features, in_features)`` of a linear module (``nn.Linear``, transformers' ``Conv1D``), else ``None``."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[1], weight.shape[0]
    return None


def _embedding_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(width, tokens)`` of an embedding, else ``None``."""
    return (module.embedding_dim, module.num_embeddings) if isinstance(module, nn.Embedding) else None


class Bank:
    """K adapters on one model; y = x Wᵀ + Σᵢ c[b, i]·(x Aᵢᵀ) Bᵢᵀ for row b.

    Works by forward hooks on the linear modules (and on embeddings that an adapter changes): weights, state dict and
    module tree of the model do not change. Without a selection (:meth:`using`, :meth:`using_rows`) the model answers as
    the base.

    Args:
        model: any module with linear modules, on its device.
        base: which base ``model`` is; adapters of another base are then refused.
    """

    def __init__(self, model: nn.Module, base: BaseId | None = None) -> None:
        self.model = model
        self.base = base
        self._switch = Switch()
        self._layers: dict[str, BankLayer] = {}
        self._handles: dict[str, Any] = {}
        self._adapters: dict[str, Adapter] = {}
        self._trainable: dict[str, TrainableMember] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Mounted adapters, the trainable one last."""
        return (*self._adapters, *self._trainable)

    def layers(self) -> Mapping[str, BankLayer]:
        """Module path → the layer mounted there."""
        return MappingProxyType(self._layers)

    def load(self, name: str, adapter: Adapter | str | Path) -> Adapter:
        """Mount an adapter (or a PEFT directory) under ``name``.

        Raises:
            AdapterError: the name is taken, the base is another one, or a module is missing or of another shape.
                Nothing is mounted then.
        """
        self._free(name)
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter)
        ours, theirs = (self.base.weights if self.base else ""), adapter.base.weights
        if ours and theirs and ours != theirs:
            raise AdapterError(
                f"adapter {name!r} was trained on base {adapter.base.name or theirs[:19]!r}, whose weights differ from "
                f"the mounted {self.base.name if self.base else ''!r}; load the base it belongs to"
            )
        targets = {
            path: self._target(name, path, update.shape, path in adapter.embeddings)
            for path, update in adapter.modules.items()
        }
        for path, update in adapter.modules.items():
            self._layer(path, targets[path]).load(name, update)
        self._adapters[name] = adapter
        return adapter

    def mount_trainable(self, name: str, member: TrainableMember) -> None:
        """Mount the adapter that is being trained; its factors stay the parameters of ``member``.

        Raises:
            AdapterError: as :meth:`load`, or another trainable member is mounted.
        """
        self._free(name)
        if self._trainable:
            raise AdapterError(
                f"one member trains at a time; {next(iter(self._trainable))!r} is mounted, evict it first"
            )
        shapes = zip(member.paths, member.B, member.A, strict=True)
        targets = {path: self._target(name, path, (B.shape[0], A.shape[1])) for path, B, A in shapes}
        for index, path in enumerate(member.paths):
            self._layer(path, targets[path]).trainable = (name, member, index)
        self._trainable[name] = member
        self._switch.guarded = True

    def evict(self, name: str) -> None:
        """Take ``name`` off the model.

        Raises:
            AdapterError: it is not mounted, or it is in use just now.
        """
        self._known([name])
        if self._switch.selection is not None and name in self._switch.selection.members:
            raise AdapterError(f"{name!r} is in use; evict it outside `using`")
        for path, layer in list(self._layers.items()):
            layer.evict(name)
            if layer.empty:
                self._handles.pop(path).remove()
                del self._layers[path]
        self._adapters.pop(name, None)
        self._trainable.pop(name, None)
        self._switch.guarded = bool(self._trainable)

    def check(self) -> None:
        """What the forward pass multiplies by is what was mounted; asked after a stage has trained beside it.

        While a member is mounted to train this is asked too whenever factors are put together anew.

        Raises:
            TrainingError: it was changed meanwhile.
        """
        for layer in self._layers.values():
            layer.check()

    def unmount(self) -> None:
        """Take everything off: the model is the one that was given."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._layers.clear()
        self._adapters.clear()
        self._trainable.clear()
        self._switch.guarded = False

    def member(self, name: str) -> Adapter:
        """The adapter under ``name``; a trainable one as it stands now, scale folded into B.

        Raises:
            AdapterError: it is not mounted.
        """
        self._known([name])
        if name in self._adapters:
            return self._adapters[name]
        return Adapter(self._trainable[name].folded(), self.base or BaseId())

    @contextmanager
    def using(self, weights: Coefficients) -> Iterator[None]:
        """Inside, every row has the same coefficients: name → λ (a float, or a scalar tensor to differentiate).

        Names that are not given, or given 0.0, do not act; ``{}`` is the base.

        Raises:
            AdapterError: a name is not mounted.
        """
        yield from self._using([weights], per_row=False)

    @contextmanager
    def using_rows(self, rows: Sequence[Coefficients]) -> Iterator[None]:
        """Inside, row b of the batch has the coefficients ``rows[b]``; ``{}`` is the base.

        Raises:
            AdapterError: a name is not mounted, or later the batch has another number of rows.
        """
        yield from self._using(rows, per_row=True)

    @contextmanager
    def using_tensor(
        self, members: Sequence[str], coefficients: Tensor, groups: Mapping[str, int] | None = None
    ) -> Iterator[None]:
        """Inside, row b of the batch has the coefficients of row b of a tensor, which may require gradients.

        Args:
            members: K names; those that are 0 in all rows are multiplied all the same.
            coefficients: ``[b, K]``, or ``[1, K]`` for a batch of one row; floating point, used in the modules' dtype.
                With ``groups`` ``[b, G, K]``.
            groups: module path → group, for every module that ``members`` change.

        Raises:
            AdapterError: a name is not mounted or given twice, the shape is another one, a module has no group, or
                later the batch has another number of rows.
        """
        self._known(members)
        if len(set(members)) != len(members):
            raise AdapterError(f"coefficients name a member twice: {', '.join(members)}; name each once")
        axes, wanted = (2, "[b, K]") if groups is None else (3, "[b, G, K]")
        if coefficients.ndim != axes or coefficients.shape[-1] != len(members) or not coefficients.is_floating_point():
            raise AdapterError(
                f"coefficients are {tuple(coefficients.shape)} {coefficients.dtype}; expected {wanted} in floating "
                f"point, K = {len(members)} for {', '.join(members) or 'no member'}"
            )
        if groups is not None:
            for path, layer in self._layers.items():
                if layer.holds(members) and not 0 <= groups.get(path, -1) < coefficients.shape[1]:
                    raise AdapterError(
                        f"module {path!r} is in no group of layers (there are {coefficients.shape[1]}); the groups "
                        "were made for other adapters"
                    )
        device = next(self.model.parameters()).device
        selection = Selection(tuple(members), coefficients.to(device), per_row=True, groups=groups) if members else None
        yield from self._selected(selection)

    def _using(self, rows: Sequence[Coefficients], per_row: bool) -> Iterator[None]:
        self._known([name for row in rows for name in row])
        acting = {name for row in rows for name, c in row.items() if isinstance(c, Tensor) or c != 0.0}
        members = tuple(name for name in self.names if name in acting)
        selection = None
        if members:
            device = next(self.model.parameters()).device
            shared = [rows[0].get(name, 0.0) for name in members] if not per_row else []
            numbers = tuple(c for c in shared if not isinstance(c, Tensor))
            selection = Selection(
                members, _matrix(rows, members, device), per_row, numbers if len(numbers) == len(members) else None
            )
        yield from self._selected(selection)

    def _selected(self, selection: Selection | None) -> Iterator[None]:
        before, self._switch.selection = self._switch.selection, selection
        try:
            yield
        finally:
            self._switch.selection = before

    def _free(self, name: str) -> None:
        if name in self.names:
            raise AdapterError(f"{name!r} is mounted already; evict it first, or choose another name")

    def _known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise AdapterError(f"no adapter {name!r} is mounted; mounted: {', '.join(self.names) or 'none'}{hint}")

    def _target(self, name: str, path: str, shape: tuple[int, int], embedding: bool = False) -> nn.Module:
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            linears = [p for p, m in self.model.named_modules() if linear_shape(m)]
            near = difflib.get_close_matches(path, linears, 1, cutoff=0.3)
            hint = f"; the nearest module is {near[0]!r}" if near else ""
            raise AdapterError(
                f"adapter {name!r} changes {path!r}, which {type(self.model).__name__} does not have{hint}. "
                "It belongs to another base"
            ) from None
        found = _embedding_shape(module) if embedding else linear_shape(module)
        if found != shape:
            raise AdapterError(
                f"adapter {name!r} has an update of shape {shape} for {path!r}, a {type(module).__name__} of shape "
                f"{found}. It belongs to another base"
            )
        return module

    def _layer(self, path: str, module: nn.Module) -> BankLayer:
        if path not in self._layers:
            weight = module.weight
            assert isinstance(weight, Tensor)
            # A quantised weight is stored as integers; its adapters compute in the model's floating dtype.
            dtype = weight.dtype if weight.is_floating_point() else getattr(self.model, "dtype", torch.float32)
            layer = BankLayer(path, self._switch, weight.device, dtype)
            self._layers[path] = layer
            self._handles[path] = module.register_forward_hook(layer)
        return self._layers[path]


@contextmanager
def adapter_free(model: nn.Module) -> Iterator[None]:
    """Inside, no adapter that a bank has mounted on ``model`` acts, whatever its selection is."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    switches = {id(hook.switch): hook.switch for hook in hooks if isinstance(hook, BankLayer)}.values()
    before = [switch.selection for switch in switches]
    for switch in switches:
        switch.selection = None
    try:
        yield
    finally:
        for switch, selection in zip(switches, before, strict=True):
            switch.selection = selection


def _matrix(rows: Sequence[Coefficients], members: tuple[str, ...], device: torch.device) -> Tensor:
    """``[len(rows), K]`` float32 on ``device``; keeps gradients of tensor coefficients."""
    flat = [row.get(name, 0.0) for row in rows for name in members]
    if any(isinstance(c, Tensor) for c in flat):
        tensors = [c if isinstance(c, Tensor) else torch.tensor(float(c)) for c in flat]
        values = torch.stack([t.to(device=device, dtype=torch.float32).reshape(()) for t in tensors])
    else:
        values = torch.tensor([float(c) for c in flat], dtype=torch.float32, device=device)
    return values.reshape(len(rows), len(members))
