"""Whether adapters belong to a base, by what they say of it themselves."""

from __future__ import annotations

from collections.abc import Mapping

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import AdapterError


def check_base(adapters: Mapping[str, Adapter], base: BaseId) -> None:
    """Every adapter was trained on the weights of ``base``, as far as it says which.

    Raises:
        AdapterError: one was trained on other weights.
    """
    for name, adapter in adapters.items():
        if adapter.base.weights and adapter.base.weights != base.weights:
            raise AdapterError(
                f"adapter {name} was trained on {adapter.base.name or 'another base'}, whose weights are not those of "
                f"{base.name}; use its own base, or another adapter"
            )


def base_remarks(adapters: Mapping[str, Adapter], base: BaseId | None = None) -> list[str]:
    """What does not forbid its use and should be known: an adapter that names no base, or saw another template.

    Args:
        adapters: by name.
        base: what they will run on; ``None`` if there is none yet.
    """
    out = []
    for name, adapter in adapters.items():
        if not adapter.base.weights:
            out.append(f"note: {name} does not say which weights it was trained on; only shapes are checked")
        elif base is not None and base.template and adapter.base.template not in ("", base.template):
            out.append(f"warning: {name} was trained with another chat template than this base has")
    return out
