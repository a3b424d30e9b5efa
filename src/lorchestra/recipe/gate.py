"""``fusion.gate``: a small network that chooses the adapters' coefficients prompt by prompt; its keys, its mistakes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lorchestra.errors import counted
from lorchestra.recipe.words import Problem
from lorchestra.train.settings import Positive, Settings

if TYPE_CHECKING:
    from lorchestra.recipe.recipe import Recipe

Activation = Literal["softmax", "sigmoid", "linear"]
Count = Annotated[int, Field(ge=0)]
SEVERAL = ("activation", "layers", "hidden")  # keys that may list values, of which λ-validation chooses
MOST = 12  # gates that are fitted for one recipe


class Gate(Settings):
    """A gate beside the static coefficients; see :mod:`lorchestra.gate`. It is delivered only if it beats them.

    Without ``groups`` above 1 one coefficient an adapter and prompt. ``top_k`` null lets every adapter act.
    """

    activation: (
        Literal["auto", "softmax", "sigmoid", "linear"] | Annotated[tuple[Activation, ...], Field(min_length=1)]
    ) = "auto"
    layers: Count | Annotated[tuple[Count, ...], Field(min_length=1)] = 0
    hidden: Count | Annotated[tuple[Count, ...], Field(min_length=1)] = 0
    last_token: bool = False
    groups: Annotated[int, Field(ge=1)] = 1
    top_k: Annotated[int, Field(ge=1)] | None = None
    none: bool = False
    temperature: Positive = 1.0
    examples: Annotated[int, Field(ge=1)] | None = 100
    epochs: Annotated[float, Field(ge=0)] = 2.0
    learning_rate: Positive = 1e-3
    batch_size: Annotated[int, Field(ge=1)] = 8
    patience: Annotated[int, Field(ge=1)] = 3
    entropy: Annotated[float, Field(ge=0)] = 0.0
    balance: Annotated[float, Field(ge=0)] = 0.01
    keep_prompts: bool = False


def gate_form(value: Any) -> Any:
    """``true`` is a gate with every key at its default, ``false`` is none."""
    if value is True:
        return {}
    if value is False:
        return None
    if isinstance(value, dict):
        return {key: inner for key, inner in value.items() if inner is not None or key in ("top_k", "examples")}
    if value is not None and not isinstance(value, Gate):
        raise ValueError("write true, or a mapping, as in gate: {activation: sigmoid, top_k: 2}")
    return value


def candidates(recipe: Recipe) -> list[Gate]:
    """The gates that are fitted, one value a key: a recipe that lists several has λ-validation choose among them."""
    gate = recipe.fusion.gate
    if gate is None:
        return []
    listed = []
    for key in SEVERAL:
        value = getattr(gate, key)
        values = dict.fromkeys(value if isinstance(value, tuple) else (value,))
        listed.append([suggest_activation(recipe)[0] if key == "activation" and v == "auto" else v for v in values])
    return [gate.model_copy(update=dict(zip(SEVERAL, values, strict=True))) for values in product(*listed)]


def reason(recipe: Recipe) -> str:
    """Why ``activation: auto`` is what it is; empty where the recipe says which."""
    gate = recipe.fusion.gate
    return suggest_activation(recipe)[1] if gate is not None and gate.activation == "auto" else ""


def suggest_activation(recipe: Recipe) -> tuple[Activation, str]:
    """What ``activation: auto`` stands for, and why.

    Adapters that were trained beside one another are at their best together, at Σλ above 1, which a softmax has no
    coefficients for.
    """
    if recipe.fusion.gate is not None and recipe.fusion.gate.none:
        return "softmax", "none: true is a share of a softmax"
    inside = set(recipe.members)
    beside = next((s.name for s in recipe.stages if s.name in inside and inside & s.context.keys()), "")
    if beside:
        return "sigmoid", f"{beside!r} was trained beside other members, so they may be wanted together, each at 1"
    return "softmax", "no member was trained beside another, so they share one prompt's weight"


def gate_problems(recipe: Recipe) -> Iterable[Problem]:
    """What is wrong with ``fusion.gate``; places are those inside it."""
    gate = recipe.fusion.gate
    if gate is None:
        return
    if recipe.split.validation == 0:
        yield (), "a gate is chosen on λ-validation, and split.validation is 0; give it a share, or leave the gate out"
    if recipe.split.test == 0:
        yield (
            (),
            "a gate is delivered only if it beats the static weights on the sealed test, and split.test is 0; give it "
            "a share, or leave the gate out",
        )
    if recipe.fusion.refit:
        yield (
            (),
            "a gate belongs to the adapters that it was fitted to, and refit trains them again; leave one of them out",
        )
    members = recipe.members
    acts = {candidate.activation for candidate in candidates(recipe)}
    if len(members) == 1 and "softmax" in acts and not gate.none:
        yield (
            (),
            f"a softmax over one adapter ({members[0]}) is always 1; add members, or set none: true or activation: "
            "sigmoid",
        )
    if gate.none and (others := sorted(acts - {"softmax"})):
        yield ("none",), f"is a share of a softmax; {others[0]} has coefficients near 0 anyway. Leave one of them out"
    if gate.temperature != 1 and "linear" in acts:
        yield ("temperature",), "belongs to softmax and sigmoid; linear coefficients are the network's own"
    if gate.top_k is not None and gate.top_k > len(members):
        yield (
            ("top_k",),
            f"is {gate.top_k}, and the fusion has {counted(len(members), 'member')} ({', '.join(members)})",
        )
    if (count := len(candidates(recipe))) > MOST:
        keys = " × ".join(key for key in SEVERAL if isinstance(getattr(gate, key), tuple))
        yield (), f"{keys} are {count} gates to fit; list at most {MOST}"


def deep_problems(recipe: Recipe, layers: int) -> Iterable[Problem]:
    """What the base says to the numbers of layers; places are those inside the recipe."""
    gate = recipe.fusion.gate
    if gate is None:
        return
    deepest = max(gate.layers) if isinstance(gate.layers, tuple) else gate.layers
    if deepest > layers:
        yield ("fusion", "gate", "layers"), f"is {deepest}, and the base has {counted(layers, 'layer')}"
    if gate.groups > layers:
        yield ("fusion", "gate", "groups"), f"is {gate.groups}, and the base has {counted(layers, 'layer')}"
