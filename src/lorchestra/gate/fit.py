"""Train a gate: base and adapters frozen, the loss of the real mixture, gradients through the bank's coefficients.

Features are computed once, since nothing changes them. The gate begins where a fit to the adapters' own losses puts it
(:mod:`lorchestra.gate.warm`), or at static weights if those are better on validation examples, and goes on end to end:
of every batch the coefficients are made, used row by row, and the loss is followed back to the network alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.bank import Bank
from lorchestra.errors import AdapterError, DivergedError, UserError
from lorchestra.events import SILENT, Reporter
from lorchestra.fusion.groups import OTHER, layer_groups
from lorchestra.gate.features import FeatureSpec, features
from lorchestra.gate.loads import BASE, Loads, loads
from lorchestra.gate.measure import (
    GateExample,
    Measured,
    check_examples,
    domain_shares,
    example_losses,
    measure,
    measured_digest,
    packed,
)
from lorchestra.gate.network import AdapterId, Gate, GateSpec, Known
from lorchestra.gate.settings import FitSettings
from lorchestra.gate.warm import Scored, set_static, warm_start
from lorchestra.objective.attention import quick_attention
from lorchestra.objective.batch import Batch
from lorchestra.objective.logprobs import branch_logprobs
from lorchestra.objective.norm import quick_norms

POSITIONS = 1024  # of a forward and backward pass, padding included: its activations are all that is kept
CHECKS = 2  # validations an epoch
EXCERPT = 200  # characters of a prompt that are kept, where they are


@dataclass(frozen=True)
class Check:
    """One validation: after ``step`` steps, with the mean training loss since the last, both over the base's."""

    step: int
    training: float | None
    validation: float


@dataclass(frozen=True)
class Fitted:
    """A trained gate.

    Args:
        gate: as it was at its best validation.
        history: every validation.
        begun: what training began from: ``warm`` or ``static``.
        validation: model → mean over domains of loss / base loss, on the validation examples: every member, ``oracle``
            (the best single one of each domain, the base included) and ``gate``.
        loads: what the gate gives to whom, on the validation examples.
    """

    gate: Gate
    history: tuple[Check, ...]
    begun: Literal["warm", "static"]
    validation: Mapping[str, float]
    loads: Loads

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, all but the gate."""
        return {
            "history": [asdict(check) for check in self.history],
            "begun": self.begun,
            "validation": dict(self.validation),
            "loads": self.loads.as_dict(),
        }


@dataclass(frozen=True, eq=False)
class _Part:
    """Examples with what is known of them: features ``[n, F]``, losses ``[n, K + 1]``, margins and weights ``[n]``."""

    examples: Sequence[GateExample]
    x: Tensor
    losses: Tensor
    margins: Sequence[float]
    shares: Tensor

    @classmethod
    def of(
        cls, examples: Sequence[GateExample], x: Tensor, rows: Sequence[Sequence[float]], margins: Sequence[float]
    ) -> _Part:
        losses = torch.tensor(rows, dtype=torch.float64)
        return cls(examples, x, losses, margins, domain_shares(examples, losses[:, 0].tolist()))

    def scored(self) -> Scored:
        """With losses over the tokens of the answer; of pairs as they are."""
        counts = [example.scored.supervised if example.kind == "sft" else 1 for example in self.examples]
        tokens = torch.tensor(counts, dtype=self.losses.dtype).clamp(min=1)
        domains = [example.domain for example in self.examples]
        return Scored(self.x, self.losses / tokens[:, None], domains, self.shares.to(tokens) * tokens)


@dataclass(frozen=True, eq=False)
class _Mixer:
    """The base with the members mounted, which a gate's coefficients mix row by row."""

    bank: Bank
    pad_id: int
    betas: Mapping[str, float]
    groups: Mapping[str, int] | None

    def losses(self, gate: Gate, rows: Tensor, part: _Part, indices: list[int], batch: Batch) -> Tensor:
        """``[items]`` of the batch that holds ``indices``; ``rows`` ``[items, K]`` or ``[items, G, K]``."""
        with self.bank.using_tensor(gate.members, rows[batch.row_item.cpu()], self.groups):
            scores = branch_logprobs(self.bank.model, batch)
        return example_losses(
            scores, [part.examples[i] for i in indices], [part.margins[i] for i in indices], self.betas
        )

    @torch.no_grad()
    def validate(self, gate: Gate, part: _Part) -> float:
        """Mean over domains of loss / base loss, with the gate as it will be used."""
        coefficients = gate.coefficients(part.x)
        total = 0.0
        for indices, batch in packed(
            self.bank.model, part.examples, range(len(part.examples)), self.pad_id, 4 * POSITIONS
        ):
            index = torch.tensor(indices)
            losses = self.losses(gate, coefficients[index], part, indices, batch)
            total += float((losses.cpu().double() * part.shares[index]).sum())
        return total

    def step(
        self, gate: Gate, part: _Part, chosen: list[int], settings: FitSettings, optimiser: torch.optim.Optimizer
    ) -> float:
        """One step; the loss over the base's before it, without the terms that spread the weight."""
        optimiser.zero_grad()
        coefficients = gate.coefficients(part.x[torch.tensor(chosen)], top_k=False)
        # The base is followed back to the coefficients batch by batch, then the network to its weights, once.
        leaf = coefficients.detach().requires_grad_()
        place = {i: row for row, i in enumerate(chosen)}
        total = 0.0
        for indices, batch in packed(self.bank.model, part.examples, chosen, self.pad_id, POSITIONS):
            losses = self.losses(gate, leaf[torch.tensor([place[i] for i in indices])], part, indices, batch)
            shares = part.shares[torch.tensor(indices)] * (len(part.examples) / len(chosen))
            loss = (losses * shares.to(losses)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        spread = _spread(coefficients, settings)
        assert leaf.grad is not None
        torch.autograd.backward([coefficients, spread], [leaf.grad, torch.ones_like(spread)])
        optimiser.step()
        return total


def fit(
    bank: Bank,
    members: Sequence[str],
    train: Sequence[GateExample],
    validation: Sequence[GateExample],
    settings: FitSettings,
    *,
    name: str = "gate",
    pad_id: int,
    betas: Mapping[str, float] | None = None,
    measured: Measured | None = None,
    start: Mapping[str, float] | None = None,
    prompts: Sequence[tuple[str, tuple[int, ...]]] = (),
    reporter: Reporter = SILENT,
) -> Fitted:
    """Train a gate over ``members``.

    Args:
        bank: on a frozen model, with the members mounted.
        members: K of its names.
        train: to learn from, of all domains.
        validation: to stop by, of the same.
        settings: how.
        name: of the gate.
        pad_id: token id for padding.
        betas: domain → β of preference pairs.
        measured: from :func:`~lorchestra.gate.measure.measure` of the same, where several gates are fitted.
        start: member → λ, static weights to begin from if they are better than the warm start.
        prompts: further training prompts, each with its domain, one of those in ``train``: nobody scores them, the warm
            start takes their domain's mean losses for theirs.
        reporter: progress.

    Raises:
        UserError: settings that do not go together, or ``measured`` of something else.
        DataError: no examples, or one without a prompt.
        DivergedError: a loss that is not finite.
    """
    betas = betas or {}
    spec = _spec(bank, members, settings, name)
    check_examples(train, validation)
    more = _further(train, prompts)
    count = len(train) + len(validation) + len(more)
    with reporter.task("features", count, "prompt") as task:
        asked = [[example.item.prompt for example in part] for part in (train, validation)]
        seen = [features(bank.model, part, spec.features) for part in asked]
        beside = features(bank.model, [ids for _, ids in more], spec.features) if more else None
        task.advance(count)
    if measured is None:
        measured = measure(bank, members, train, validation, pad_id=pad_id, betas=betas, reporter=reporter)
    elif measured.digest != measured_digest(bank, members, train, validation, betas):
        raise UserError("the losses that were measured are of other examples or adapters; measure them anew")
    learn = _Part.of(train, seen[0], measured.train, measured.margins[: len(train)])
    held = _Part.of(validation, seen[1], measured.validation, measured.margins[len(train) :])
    paths = {path for member in members for path in bank.member(member).modules}
    mixer = _Mixer(bank, pad_id, betas, spec.group_of(sorted(paths)))
    with quick_attention(bank.model), quick_norms(bank.model):
        further = beside, [domain for domain, _ in more]
        gate, begun, first = _begin(mixer, spec, learn, held, further, start, settings)
        history = _train(mixer, gate, learn, held, settings, first, reporter)
    known = [Known(e.digest, e.domain, e.text[:EXCERPT] if settings.keep_prompts else "") for e in train]
    gate.remember(learn.x, known)
    gate.eval().requires_grad_(False)
    best, ratios = _rivals(members, held)
    ratios["gate"] = min(check.validation for check in history)
    found = loads(spec, [example.domain for example in validation], gate.coefficients(held.x), best)
    return Fitted(gate, tuple(history), begun, ratios, found)


def _further(
    train: Sequence[GateExample], prompts: Sequence[tuple[str, tuple[int, ...]]]
) -> list[tuple[str, tuple[int, ...]]]:
    """``prompts`` that are none of the examples'.

    Raises:
        UserError: one of a domain without examples.
    """
    known, domains = {example.item.prompt for example in train}, {example.domain for example in train}
    strange = sorted({domain for domain, _ in prompts} - domains)
    if strange:
        raise UserError(f"there are prompts of {strange[0]!r}, and no examples of it; give some")
    return [(domain, ids) for domain, ids in prompts if ids and ids not in known]


def _spec(bank: Bank, members: Sequence[str], settings: FitSettings, name: str) -> GateSpec:
    adapters = {member: bank.member(member) for member in members}
    _refuse_head(bank.model, adapters)
    groups: tuple[str, ...] = ()
    if settings.groups > 1:
        groups = tuple(
            layer_groups({path for adapter in adapters.values() for path in adapter.modules}, settings.groups)
        )
        layers = len(groups) - (OTHER in groups)
        if layers < settings.groups:
            raise UserError(f"groups is {settings.groups}, and the adapters change {layers} layers; give at most that")
    if settings.top_k is not None and settings.top_k > len(members):
        raise UserError(f"top_k is {settings.top_k}, and there are {len(members)} adapters; give at most that")
    if len(members) == 1 and settings.activation == "softmax" and not settings.none:
        raise UserError(
            f"a softmax over {members[0]!r} alone is always 1; add adapters, or let the base compete (none)"
        )
    return GateSpec(
        name,
        tuple(AdapterId(member, adapter.digest) for member, adapter in adapters.items()),
        bank.base or BaseId(),
        FeatureSpec(settings.layers, settings.last_token),
        settings.activation,
        groups,
        settings.top_k,
        settings.none,
        settings.temperature,
        settings.hidden,
    )


def _refuse_head(model: Any, adapters: Mapping[str, Adapter]) -> None:
    head = model.get_output_embeddings()
    paths = {path for path, module in model.named_modules() if module is head}
    for name, adapter in adapters.items():
        for path in paths & adapter.modules.keys():
            raise AdapterError(
                f"adapter {name!r} changes {path!r}, the base's output, which cannot have coefficients by row; train "
                "it on the layers alone, or choose static weights (lorchestra search)"
            )


def _begin(
    mixer: _Mixer,
    spec: GateSpec,
    learn: _Part,
    held: _Part,
    further: tuple[Tensor | None, Sequence[str]],
    start: Mapping[str, float] | None,
    settings: FitSettings,
) -> tuple[Gate, Literal["warm", "static"], float]:
    """The better of warm start and static weights on the validation examples, and its loss there."""
    mean, std = learn.x.mean(dim=0), learn.x.std(dim=0, unbiased=False)
    std = std.clamp(min=float(std.mean()) * 1e-3 + 1e-6)  # a feature that never changes says nothing

    def fresh() -> Gate:
        return Gate(spec, mean, std, settings.seed)

    gate = warm_start(fresh(), learn.scored(), held.scored(), *further)
    found = mixer.validate(gate, held)
    if start is not None:
        weights = torch.tensor([float(start.get(member, 0.0)) for member in spec.members])
        static = set_static(fresh(), weights)
        theirs = mixer.validate(static, held)
        if theirs < found:
            return static, "static", theirs
    return gate, "warm", found


def _train(
    mixer: _Mixer,
    gate: Gate,
    learn: _Part,
    held: _Part,
    settings: FitSettings,
    first: float,
    reporter: Reporter,
) -> list[Check]:
    """End to end; ``gate`` is left as it was at its best validation."""
    history = [Check(0, None, first)]
    order = list(_steps(len(learn.examples), settings))
    every = max(1, math.ceil(len(learn.examples) / settings.batch_size / CHECKS))
    optimiser = torch.optim.Adam(gate.parameters(), lr=settings.learning_rate)
    best, state, since = first, _state(gate), 0
    losses: list[float] = []
    with reporter.task("fit the gate", len(order), "step") as task:
        for step, chosen in enumerate(order, start=1):
            losses.append(mixer.step(gate, learn, chosen, settings, optimiser))
            if not math.isfinite(losses[-1]):
                raise DivergedError(
                    f"the gate's loss is {losses[-1]} at step {step}; lower the learning rate", step, len(order)
                )
            task.advance(1, loss=losses[-1])
            if step % every and step != len(order):
                continue
            found = mixer.validate(gate, held)
            history.append(Check(step, sum(losses) / len(losses), found))
            losses.clear()
            if found < best:
                best, state, since = found, _state(gate), 0
                continue
            since += 1
            if since >= settings.patience:
                break
    gate.load_state_dict(state)
    return history


def _steps(count: int, settings: FitSettings) -> Iterator[list[int]]:
    """The examples of every step: all of them once an epoch, in an order that the seed makes."""
    generator = torch.Generator().manual_seed(settings.seed)
    left = round(settings.epochs * count)
    while left > 0:
        order = torch.randperm(count, generator=generator).tolist()[:left]
        left -= len(order)
        for at in range(0, len(order), settings.batch_size):
            yield order[at : at + settings.batch_size]


def _spread(coefficients: Tensor, settings: FitSettings) -> Tensor:
    """The terms against collapse: a scalar, 0 where all members are asked alike."""
    if coefficients.shape[-1] == 1 or not (settings.entropy or settings.balance):
        return coefficients.sum() * 0.0
    sizes = coefficients.abs()
    shares = sizes / sizes.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    apart = 1 - _entropy(shares).mean()
    uneven = 1 - _entropy(shares.mean(dim=0)).mean()
    return settings.entropy * apart + settings.balance * uneven


def _entropy(shares: Tensor) -> Tensor:
    """Over its maximum, along the last axis."""
    return -(shares * shares.clamp(min=1e-9).log()).sum(dim=-1) / math.log(shares.shape[-1])


def _state(gate: Gate) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gate.state_dict().items()}


def _rivals(members: Sequence[str], held: _Part) -> tuple[dict[str, str], dict[str, float]]:
    """Domain → the best single choice, and model → mean over domains of loss / base loss, on validation examples."""
    names = (BASE, *members)
    weighted = held.losses * held.shares[:, None]
    ratios = dict(zip(names, weighted.sum(dim=0).tolist(), strict=True))
    best, oracle = {}, 0.0
    for domain in dict.fromkeys(example.domain for example in held.examples):
        rows = [i for i, example in enumerate(held.examples) if example.domain == domain]
        found = weighted[rows].sum(dim=0)
        best[domain] = names[int(found.argmin())]
        oracle += float(found.min())
    del ratios[BASE]
    return best, {**ratios, "oracle": oracle}
