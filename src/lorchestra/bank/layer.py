"""One linear module with K adapters and a coefficient for each, per row.

Axis letters: b rows (sequences), L positions, n in_features, m out_features, K active members, R = Σ rᵢ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout, embedding, linear

from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError, TrainingError


@dataclass(frozen=True, eq=False)
class Selection:
    """Which members act, and how strongly.

    Args:
        members: K names, in the order of the columns of ``coefficients``.
        coefficients: ``[1, K]`` (the same for all rows) or ``[b, K]``; with ``groups`` ``[1 or b, G, K]``; may require
            gradients.
        per_row: whether every row has coefficients of its own; a batch of one row may have.
        numbers: the K coefficients as plain numbers, where they are that and the same for all rows; else ``None``.
        groups: module path → which of G groups it is in; ``None`` where all modules have the same coefficients.
    """

    members: tuple[str, ...]
    coefficients: Tensor
    per_row: bool
    numbers: tuple[float, ...] | None = None
    groups: Mapping[str, int] | None = None

    def at(self, path: str) -> Tensor:
        """``[1 or b, K]``: the coefficients that hold at a module."""
        return self.coefficients if self.groups is None else self.coefficients[:, self.groups[path]]


class Switch:
    """The one place where a bank's layers look up the present selection."""

    def __init__(self) -> None:
        self.selection: Selection | None = None
        self.guarded = False  # a member trains: the others must be what was mounted, in every forward pass


class TrainableMember(nn.Module):
    """The adapter that is being trained: float32 masters of A and B for every target module.

    Args:
        factors: module path → ``(B [m, r], A [r, n])`` float32, without the scale.
        scale: s of ΔW = s·B·A.
        dropout: share of the inputs of A set to zero while in training mode.
    """

    def __init__(self, factors: dict[str, tuple[Tensor, Tensor]], scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.paths = tuple(sorted(factors))
        self.scale = scale
        self.dropout = dropout
        self.B = nn.ParameterList([nn.Parameter(factors[p][0].clone()) for p in self.paths])
        self.A = nn.ParameterList([nn.Parameter(factors[p][1].clone()) for p in self.paths])

    def folded(self) -> dict[str, LowRank]:
        """Module path → ΔW with the scale in B, detached copies on the CPU."""
        pairs = zip(self.paths, self.B, self.A, strict=True)
        return {path: LowRank(B.detach().cpu() * self.scale, A.detach().cpu().clone()) for path, B, A in pairs}


class _Update(torch.autograd.Function):
    """y + (c · x Aᵀ) Bᵀ with its gradients, in x's dtype: each pass over y, x and their gradients is made once.

    y ``[…, m]``, x ``[…, n]``; A ``[r, n]`` and B ``[m, r]`` in any dtype, in which their gradients are returned; c a
    number or ``[r]``, without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, c: float | Tensor) -> Tensor:
        ctx.dtypes, ctx.shape, ctx.c = (A.dtype, B.dtype), x.shape, c
        x, A, B = x.reshape(-1, x.shape[-1]), A.to(x.dtype), B.to(x.dtype)
        z = (x @ A.T).mul_(c)
        ctx.save_for_backward(x, A, B, z)
        return torch.addmm(y.reshape(-1, y.shape[-1]), z, B.T).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, z = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dz = (rows @ B).mul_(ctx.c)
        _, want_x, want_A, want_B, _ = ctx.needs_input_grad
        dx = (dz @ A).view(ctx.shape) if want_x else None
        dA = (dz.T @ x).to(ctx.dtypes[0]) if want_A else None
        dB = (z.T @ rows).T.to(ctx.dtypes[1]) if want_B else None
        return dy, dx, dA, dB, None


class _Adapted(torch.autograd.Function):
    """x Wᵀ + (c · x Aᵀ) Bᵀ, given y = x Wᵀ, which it writes into; W ``[m, n]`` is frozen.

    As :class:`_Update` and the module itself in one: neither the sum nor the gradient of x is written twice.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, c: float | Tensor) -> Tensor:
        ctx.dtypes, ctx.shape, ctx.c = (A.dtype, B.dtype), x.shape, c
        x, A, B = x.reshape(-1, x.shape[-1]), A.to(x.dtype), B.to(x.dtype)
        z = (x @ A.T).mul_(c)
        ctx.save_for_backward(x, W, A, B, z)
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(z, B.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, z = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dz = (rows @ B).mul_(ctx.c)
        _, want_x, _, want_A, want_B, _ = ctx.needs_input_grad
        dx = (rows @ W).addmm_(dz, A).view(ctx.shape) if want_x else None
        dA = (dz.T @ x).to(ctx.dtypes[0]) if want_A else None
        dB = (z.T @ rows).T.to(ctx.dtypes[1]) if want_B else None
        return None, dx, None, dA, dB, None


@dataclass(frozen=True, eq=False)
class _Stack:
    """The frozen members of a selection at one module: ``A [R, n]``, ``B [m, R]``, ``column [R]`` (→ coefficient)."""

    selection: tuple[str, ...]
    A: Tensor
    B: Tensor
    column: Tensor


class BankLayer:
    """The adapters at one linear module; a forward hook that adds Σᵢ c[b, i]·(x Aᵢᵀ) Bᵢᵀ to its output.

    At an embedding x is tokens, and x Aᵢᵀ looks their columns of Aᵢ up.
    """

    def __init__(self, path: str, switch: Switch, device: torch.device, dtype: torch.dtype) -> None:
        self.path = path
        self.switch = switch
        self.device = device
        self.dtype = dtype
        self.frozen: dict[str, LowRank] = {}
        self.trainable: tuple[str, TrainableMember, int] | None = None
        self._stack: _Stack | None = None

    def load(self, name: str, update: LowRank) -> None:
        """Mount ``update``, in the module's dtype and on its device."""
        self._drop()
        self.frozen[name] = update.to(device=self.device, dtype=self.dtype)

    def evict(self, name: str) -> None:
        """Forget ``name``, if it is here."""
        if self.trainable is not None and self.trainable[0] == name:
            self.trainable = None
        if name in self.frozen:
            self._drop()
            del self.frozen[name]

    @property
    def empty(self) -> bool:
        """Nothing is mounted here."""
        return not self.frozen and self.trainable is None

    def holds(self, members: Sequence[str]) -> bool:
        """One of ``members`` is mounted here."""
        trains = self.trainable[0] if self.trainable is not None else None
        return any(name in self.frozen or name == trains for name in members)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The forward hook: ``args[0]`` is ``[b, L, n]``, or ``[…, n]`` when coefficients are shared; at an embedding
        tokens, without the n.
        """
        selection = self.switch.selection
        if selection is None:
            return output
        x = args[0]
        axes = 2 if isinstance(module, nn.Embedding) else 3
        if selection.per_row and (x.ndim < axes or x.shape[0] != selection.coefficients.shape[0]):
            raise AdapterError(
                f"{self.path}: coefficients for {selection.coefficients.shape[0]} rows, but the input is "
                f"{tuple(x.shape)}; give one row of coefficients per sequence of the batch"
            )
        training = self.trainable is not None and self.trainable[0] in selection.members
        stack = self._stacked(selection.members)
        if stack is not None:
            # With a member and without it (a preference's reference) the context is added, and rounded, in one way.
            if selection.numbers is not None and not isinstance(module, nn.Embedding):
                output = _updated(module, output, x, stack.A, stack.B, _spread(selection, self.path, stack.column, x))
            else:
                z = _projected(module, x, stack.A)
                output = output + linear(z * _spread(selection, self.path, stack.column, z), stack.B)
        if self.trainable is not None and training:
            name, member, index = self.trainable
            k = selection.members.index(name)
            A, B = member.A[index], member.B[index]
            seen = dropout(x, member.dropout, training=member.training) if member.dropout else x
            if selection.numbers is not None:
                first = stack is None and seen is x
                c = selection.numbers[k] * member.scale
                output = _updated(module if first else None, output, seen, A, B, c)
            else:
                column = torch.tensor([k], device=x.device)
                z = linear(seen, A.to(x.dtype)) * (_spread(selection, self.path, column, x) * member.scale)
                output = output + linear(z, B.to(x.dtype))
        return output

    def check(self) -> None:
        """What the forward pass multiplies by is what was mounted, bit for bit.

        Raises:
            TrainingError: it was changed meanwhile.
        """
        if self._stack is None:
            return
        fresh = self._stacking(self._stack.selection)
        if fresh is None or not all(
            _same(getattr(fresh, part), getattr(self._stack, part)) for part in ("A", "B", "column")
        ):
            raise TrainingError(
                f"training changed its frozen context: at {self.path} the forward pass used other factors than those "
                "that were mounted; the trained adapter is not kept"
            )

    def _drop(self) -> None:
        """Forget the stack; while a member trains, not before it was looked at."""
        if self.switch.guarded:
            self.check()
        self._stack = None

    def _stacked(self, members: tuple[str, ...]) -> _Stack | None:
        if self._stack is None or self._stack.selection != members:
            self._drop()
            self._stack = self._stacking(members)
        return self._stack

    def _stacking(self, members: tuple[str, ...]) -> _Stack | None:
        here = [(k, self.frozen[name]) for k, name in enumerate(members) if name in self.frozen]
        if not here:
            return None
        columns = [torch.full((update.rank,), k, dtype=torch.int64, device=self.device) for k, update in here]
        return _Stack(
            members,
            torch.cat([update.A for _, update in here]),
            torch.cat([update.B for _, update in here], dim=1),
            torch.cat(columns),
        )


def _updated(module: nn.Module | None, y: Tensor, x: Tensor, A: Tensor, B: Tensor, c: float | Tensor) -> Tensor:
    """y + (c · x Aᵀ) Bᵀ; ``module`` is the one that made y of x, if nothing was added since."""
    out: Tensor
    if torch.is_grad_enabled() and type(module) is nn.Linear and _frozen(module) and y.dtype == module.weight.dtype:
        out = _Adapted.apply(y.detach(), x, module.weight, A, B, c)  # type: ignore[no-untyped-call]
    else:
        out = _Update.apply(y, x, A, B, c)  # type: ignore[no-untyped-call]
    return out


def _frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _projected(module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ ``[b, L, R]``; for tokens the columns of A, scaled as the embedding scales what it looks up (Gemma)."""
    if not isinstance(module, nn.Embedding):
        return linear(x, A)
    z = embedding(x, A.T)
    scale = getattr(module, "embed_scale", None)
    return z if scale is None else z * torch.as_tensor(scale).to(z)


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _spread(selection: Selection, path: str, column: Tensor, x: Tensor) -> Tensor:
    """Coefficients in the shape that multiplies ``x Aᵀ``: ``[R]``, or ``[b, 1, …, R]`` per row; in x's dtype."""
    wide = selection.at(path)[:, column].to(x.dtype)
    if not selection.per_row:
        return wide[0]
    return wide.reshape(wide.shape[0], *([1] * (x.ndim - 2)), wide.shape[1])
