"""A diagnosis as plain JSON: over everything, per layer, per kind of module, per module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from statistics import median
from typing import Any

from lorchestra.fusion.diagnose import Diagnosis, Meeting, Pair, Spectrum, by_kind, by_layer, place
from lorchestra.fusion.reading import Remark

_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def account(found: Diagnosis, reading: Iterable[Remark] = ()) -> dict[str, Any]:
    """All figures and sentences.

    Keys: ``adapters`` (name → norms, energy, per layer, kind and module), ``pairs`` (each with ``overall``,
    ``layers``, ``kinds``, ``cells`` of one layer and kind, ``modules``), ``activation`` (name of the data → the same),
    ``tiles`` (which part of ΔW the signs were counted on), ``reading``.
    """
    return {
        "adapters": {name: _adapter(found, name) for name in found.names},
        "pairs": [_pair(pair) for pair in found.pairs],
        "activation": {owner: _activation(found, owner) for owner in found.activation},
        "tiles": _tiles(found),
        "reading": [remark.as_dict() for remark in reading],
    }


def _adapter(found: Diagnosis, name: str) -> dict[str, Any]:
    spectra = found.spectra[name]
    rank = max(spectrum.rank for spectrum in spectra.values())

    def size(paths: Sequence[str]) -> dict[str, Any]:
        return {"norm": found.norm(name, paths), "relative": found.relative(name, paths)}

    kept = {str(r): found.kept(name, r) for r in (*takewhile(lambda r: r < rank, _RANKS), rank)}
    return {
        **size(list(spectra)),
        "rank": rank,
        "effective_rank": median(spectrum.effective_rank for spectrum in spectra.values()),
        "rank_90": found.rank_keeping(name, 0.90),
        "rank_99": found.rank_keeping(name, 0.99),
        "kept": kept,
        **_grouped(spectra, size),
        "modules": {
            path: {**size([path]), **_energy(spectrum), "singular_values": list(spectrum.values)}
            for path, spectrum in spectra.items()
        },
    }


def _energy(spectrum: Spectrum) -> dict[str, Any]:
    most = max(len(spectrum.values), 1)

    def keeping(share: float) -> int:
        wanted = share * (1 - 1e-12) * spectrum.square
        return next((r for r in range(1, most) if spectrum.kept(r) >= wanted), most)

    return {
        "rank": spectrum.rank,
        "effective_rank": spectrum.effective_rank,
        "rank_90": keeping(0.90),
        "rank_99": keeping(0.99),
    }


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "a": pair.a,
        "b": pair.b,
        "shared": len(pair.shared),
        "overall": _met(pair.whole()),
        **_grouped(pair.modules, lambda paths: _met(pair.whole(paths))),
        "modules": {
            path: {
                **_met(met),
                "row_angles": list(met.row_angles),
                "column_angles": list(met.column_angles),
            }
            for path, met in pair.modules.items()
            if met.dimensions
        },
    }


def _met(met: Meeting) -> dict[str, Any]:
    return {
        "cosine": met.cosine,
        "row_overlap": met.row_overlap,
        "row_chance": met.row_chance,
        "row_angle": median(met.row_angles) if met.row_angles else None,
        "column_overlap": met.column_overlap,
        "column_chance": met.column_chance,
        "column_angle": median(met.column_angles) if met.column_angles else None,
        "sign_conflict": met.signs.conflict if met.signs else None,
        "sign_conflict_weighted": met.signs.weighted if met.signs else None,
    }


def _activation(found: Diagnosis, owner: str) -> dict[str, Any]:
    def share(paths: Sequence[str]) -> dict[str, Any]:
        return {name: found.cross(owner, name, paths) for name in found.names if name != owner}

    measured = found.activation[owner]
    return {
        "tokens": found.tokens.get(owner),
        "overall": share(list(measured)),
        **_grouped(measured, share),
        "modules": {path: dict(norms) for path, norms in measured.items()},
    }


def _grouped(paths: Iterable[str], figures: Callable[[Sequence[str]], Mapping[str, Any]]) -> dict[str, Any]:
    """``figures`` of every layer, every kind, and every layer and kind."""
    known = list(paths)
    cells: dict[tuple[int | None, str], list[str]] = {}
    for path in known:
        cells.setdefault(place(path), []).append(path)
    return {
        "layers": {str(layer): figures(inside) for layer, inside in by_layer(known).items()},
        "kinds": {kind: figures(inside) for kind, inside in by_kind(known).items()},
        "cells": [{"layer": layer, "kind": kind, **figures(inside)} for (layer, kind), inside in cells.items()],
    }


def _tiles(found: Diagnosis) -> dict[str, Any]:
    looked = {path: tiles for path, tiles in found.tiles.items() if not tiles.complete}
    return {
        "seen": sum(len(tiles.seen) for tiles in found.tiles.values()),
        "total": sum(tiles.total for tiles in found.tiles.values()),
        "sampled": {
            path: {"corners": [list(corner) for corner in tiles.seen], "total": tiles.total}
            for path, tiles in looked.items()
        },
    }
