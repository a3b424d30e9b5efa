"""A diagnosis in plain words. Every sentence follows from a figure and a threshold; docs/diagnose.md lists them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorchestra.fusion.diagnose import Diagnosis, Meeting, Pair, by_layer

SAME = 0.95  # |cosine| from which two adapters are one direction: at most 18° apart
FIGHT = 0.1  # |cosine| in a layer from which it is worth a word; chance gives about 1/√(mn), below 0.01
INDEPENDENT = 0.05  # |cosine| up to which ‖a + b‖² is ‖a‖² + ‖b‖² within 5 %
OVERLAP = 0.5  # of row or column spaces: on average every direction of one is at most 45° from the other's space
ABOVE_CHANCE = 3.0  # and as many times what random spaces have
DROWNS = 3.0  # norms as k : 1
ENERGY = 0.99  # share of ‖ΔW‖² that a lower rank should keep
HALF = 0.5  # of the rank: from there on a lower one is worth a word
LARGE = 0.1  # ‖ΔW‖/‖W‖
SMALL = 2**-9  # ‖ΔW‖/‖W‖: half a step of bfloat16, on average
SIGNS = 0.55  # share of opposed signs; chance is 0.5
ACTS = 0.5  # on another's data, as a share of what that one does there
IDLE = 0.1
_SPACES = {
    "inputs": "read much the same inputs (row spaces",
    "outputs": "write much the same outputs (column spaces",
}


@dataclass(frozen=True)
class Remark:
    """One sentence, the adapters it is about, and the layers if it is about some.

    ``kind`` is the name of its row in docs/diagnose.md.
    """

    kind: str
    members: tuple[str, ...]
    text: str
    layers: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def read(found: Diagnosis) -> tuple[Remark, ...]:
    """What the figures say: pairs first, then single adapters, then what they do on each other's data."""
    out: list[Remark] = []
    for pair in found.pairs:
        out += _pair(found, pair)
    out = _gathered(out, len(found.pairs), found.names)
    for name in found.names:
        out += _single(found, name)
    out += _activation(found)
    return tuple(out)


def _pair(found: Diagnosis, pair: Pair) -> list[Remark]:
    a, b = pair.a, pair.b
    names = (a, b)
    whole = pair.whole()
    cosine = whole.cosine
    if cosine is None:
        return []  # one of them is zero; its own remark says so
    if not pair.shared:
        one = [next(iter(found.spectra[name])) for name in names]
        text = (
            f"{a} and {b} change no module in common ({a}: {one[0]}, …; {b}: {one[1]}, …): there is nothing to compare"
        )
        return [Remark("apart", names, text)]
    out = []
    norms = found.norm(a), found.norm(b)
    ratio = max(norms) / min(norms)
    large, small = (a, b) if norms[0] >= norms[1] else (b, a)
    if cosine >= SAME:
        apart = f", but for their size: norms {ratio:.2g} : 1" if ratio >= 1.25 else ""
        out.append(
            Remark("same", names, f"{a} and {b} are nearly the same adapter (cosine {_near(cosine)}{apart}): keep one")
        )
    elif cosine <= -SAME:
        out.append(Remark("opposite", names, f"{a} and {b} are opposite (cosine {_near(cosine)}): their sum cancels"))
    else:
        fights = _layers(pair, lambda c: c <= -FIGHT)
        agrees = _layers(pair, lambda c: c >= FIGHT)
        if fights:
            text = f"{a} and {b} fight in {_runs(fights)}: there their sum cancels a part of both"
            out.append(Remark("fight", names, text, tuple(layer for layer, _ in fights)))
        if agrees:
            text = f"{a} and {b} pull the same way in {_runs(agrees)}: there their sum counts a part twice"
            out.append(Remark("agree", names, text, tuple(layer for layer, _ in agrees)))
        spaces = _spaces(names, whole)
        if not fights and not agrees and abs(cosine) <= INDEPENDENT and len(spaces) < 2:
            text = (
                f"{a} and {b} are independent (cosine {_near(cosine)}): sum them freely, in the weights nothing "
                "cancels and nothing counts twice"
            )
            out.append(Remark("independent", names, text))
        elif not fights and not agrees:
            out.append(Remark("loose", names, f"{a} and {b} are loosely related (cosine {_near(cosine)})"))
        out += spaces
    if ratio >= DROWNS and abs(cosine) < SAME:
        text = f"{large} drowns {small} at equal weights: norms {ratio:.2g} : 1"
        out.append(Remark("drowns", (large, small), text))
    if whole.signs is not None and whole.signs.conflict >= SIGNS and cosine > -SAME:
        text = f"{a} and {b} have opposite signs in {whole.signs.conflict:.0%} of the entries that they share"
        out.append(Remark("signs", names, text))
    return out


def _spaces(names: tuple[str, str], whole: Meeting) -> list[Remark]:
    """Whether they read the same inputs and write the same outputs, whatever the cosine."""
    out = []
    for kind, overlap, chance in (
        ("inputs", whole.row_overlap, whole.row_chance),
        ("outputs", whole.column_overlap, whole.column_chance),
    ):
        if overlap is not None and chance is not None and overlap >= max(OVERLAP, ABOVE_CHANCE * chance):
            text = f"{names[0]} and {names[1]} {_SPACES[kind]} overlap by {overlap:.2f}, chance is {chance:.2g})"
            out.append(Remark(kind, names, text))
    return out


def _gathered(remarks: list[Remark], pairs: int, names: tuple[str, ...]) -> list[Remark]:
    """What holds for every one of several pairs is said once."""
    out = list(remarks)
    for kind, what in _SPACES.items():
        alike = [remark for remark in out if remark.kind == kind]
        if len(alike) == pairs > 1:
            out = [remark for remark in out if remark.kind != kind]
            out.append(Remark(kind, names, f"all of them {what} overlap by at least {OVERLAP:g} in every pair)"))
    return out


def _single(found: Diagnosis, name: str) -> list[Remark]:
    if found.norm(name) == 0:
        return [Remark("nothing", (name,), f"{name} changes nothing: every ΔW is zero")]
    out = []
    rank = max(spectrum.rank for spectrum in found.spectra[name].values())
    enough = found.rank_keeping(name, ENERGY)
    if enough <= HALF * rank:
        text = f"rank {enough} would keep {_percent(found.kept(name, enough))} of {name}'s ‖ΔW‖² (it has rank {rank})"
        out.append(Remark("rank", (name,), text))
    relative = found.relative(name)
    if relative is not None and relative >= LARGE:
        out.append(Remark("large", (name,), f"{name} is large beside the base: ‖ΔW‖/‖W‖ is {relative:.1%}"))
    if relative is not None and relative < SMALL:
        text = (
            f"{name} is small beside the base: ‖ΔW‖/‖W‖ is {relative:.2%}, below half a step of bfloat16 "
            f"({SMALL:.2%}): merge it with --dtype float32, or serve it apart"
        )
        out.append(Remark("small", (name,), text))
    return out


def _activation(found: Diagnosis) -> list[Remark]:
    out = []
    for owner in found.activation:
        shares = {name: found.cross(owner, name) for name in found.names if name != owner}
        acts = {name: share for name, share in shares.items() if share is not None and share >= ACTS}
        idle = {name: share for name, share in shares.items() if share is not None and share <= IDLE}
        if acts:
            text = f"on {owner}'s data {owner} is not alone: beside its own change of the outputs stand {_times(acts)}"
            out.append(Remark("acts", (*acts, owner), text))
        if idle:
            text = f"on {owner}'s data these hardly act, beside {owner} itself: {_times(idle)}"
            out.append(Remark("idle", (*idle, owner), text))
    return out


def _times(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.2g}×" for name, share in shares.items())


def _layers(pair: Pair, wanted: Callable[[float], bool]) -> list[tuple[int, float]]:
    """(layer, cosine) of the layers whose cosine is as wanted."""
    found = ((layer, pair.whole(paths).cosine) for layer, paths in by_layer(pair.modules).items())
    return [(layer, cosine) for layer, cosine in found if cosine is not None and wanted(cosine)]


def _runs(layers: Sequence[tuple[int, float]]) -> str:
    """``layers 2, 12–18 (cosine −0.31 to −0.12)``."""
    runs: list[list[int]] = []
    for layer, _ in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
    low, high = _near(min(c for _, c in layers)), _near(max(c for _, c in layers))
    spread = low if low == high else f"{low} to {high}"
    return f"{'layer' if len(layers) == 1 else 'layers'} {text} (cosine {spread})"


def _percent(share: float) -> str:
    """A share of the energy, never rounded up to more than it is."""
    return f"{int(share * 1000) / 10:g} %"


def _near(cosine: float) -> str:
    """Two decimals, a true minus sign, no negative zero."""
    return f"{cosine:z.2f}".replace("-", "−")
