"""``model`` → who answers: the base, adapters, aliases, mixtures; by name alone, and for each key as if no other were.

Nothing here touches the disk but :meth:`Router.read`, which takes a path and never a name.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lorchestra.errors import AdapterError, UserError, counted
from lorchestra.registry.access import Key
from lorchestra.registry.naming import meant
from lorchestra.registry.reference import (
    Mixture,
    Reference,
    check_name,
    is_mixture,
    parse_mixture,
    parse_reference,
)
from lorchestra.serve.adapter_files import served
from lorchestra.serve.engine import RequestError, Served, Target
from lorchestra.serve.ports import Card, UnknownModelError
from lorchestra.serve.versions import Found, Pointer, Versions, View

MOST_MEMBERS = 8


class Router:
    """What is served under which name. It belongs to one event loop.

    Args:
        base: what the base is called.
        adapters: to begin with.
        aliases: a name (or ``name@word``) → a reference, a mixture, or the base's name.
        most_members: of a mixture.
        roots: directories that :meth:`read` may read from.
        max_length: positions of a sequence, to be shown.
        versions: of a registry, whose names are served too; where another thing here has such a name, that wins.
        gates: names of gates, which nothing else may have here.

    Raises:
        UserError: a name is used twice, or an alias leads nowhere.
    """

    def __init__(
        self,
        base: str,
        adapters: Iterable[Served] = (),
        aliases: Mapping[str, str] | None = None,
        *,
        most_members: int = MOST_MEMBERS,
        roots: Sequence[Path] = (),
        max_length: int | None = None,
        versions: Versions | None = None,
        gates: Collection[str] = (),
    ) -> None:
        self.base, self.most_members, self.max_length, self.versions = base, most_members, max_length, versions
        self._gates = frozenset(gates)
        self._roots = tuple(root.resolve() for root in roots)
        self.created = int(time.time())
        self._adapters: dict[str, tuple[Served, int]] = {}
        self._changes = 0  # of them
        self._present: dict[str, _Present] = {}  # by the key's name
        self._aliases: dict[Reference, Mixture | None] = {}  # None: the base
        for text, meaning in (aliases or {}).items():
            self._alias(text, meaning)
        self._hiding = {base, *gates, *(alias.name for alias in self._aliases if not alias.selector)}
        for adapter in adapters:
            self.add(adapter)
        for alias, mixture in self._aliases.items():
            for member, _ in mixture.members if mixture else ():
                if self._find(member) is None:
                    known = ", ".join([*self._adapters, *self._of_registry()][:20]) or "none"
                    raise UserError(f"alias {alias}: there is no adapter {member}; there are {known}")

    def resolve(self, key: Key, model: str, user: str = "") -> Target:
        """Who answers ``model`` for ``key``.

        Args:
            key: of who asks.
            model: as the request says.
            user: of the tenant, as the request names it: with a canary, who answers depends on it.

        Raises:
            UnknownModelError: there is no such model, or it is not the key's to use: nobody can tell which.
            RequestError: a mixture that is none, or of too many.
            ColdError: a version is not here yet; prepare it, and resolve again.
            RevokedModelError, StoppingError, AdapterError: as :meth:`Versions.served`.
        """
        if model == self.base:
            return Target(model)
        return self.mixed(key, model, self._members(model), user)

    def mixed(self, key: Key, model: str, members: Sequence[tuple[Reference, float]], user: str = "") -> Target:
        """A sum of ``members`` for ``key``, under the name ``model``; as :meth:`resolve`, which raises the same."""
        found = [(self._find(reference, key.name, user), key.may_use(reference.name), weight)
                 for reference, weight in members]  # fmt: skip
        if not all(one is not None and may for one, may, _ in found):
            raise unknown(model)
        served = tuple((self._served(one, model), weight) for one, _, weight in found if one is not None)
        if len(found) == 1 and found[0][2] == 1.0 and isinstance(one := found[0][0], Found):
            return Target(model, served, one.arm, one.rollout)
        return Target(model, served)

    def knows(self, reference: Reference) -> bool:
        """Whether there is such an adapter, revoked or not."""
        return self._find(reference) is not None

    def places(self, reference: Reference) -> Sequence[Reference]:
        """Where the weights of a name and whole digest are: there, revoked or not; else the versions of the registry's
        other names that have them, by which permissions and revocations then go.
        """
        if self.knows(reference):
            return (reference,)
        lines = self.versions.view.snapshot.holding(reference.digest) if self.versions else ()
        return tuple(Reference(line.name, f"v{line.number}") for line in lines if not self._taken(line.name))

    def usable(self, key: Key, reference: Reference) -> bool:
        """Whether ``key`` may use it and it is there: neither revoked nor known to be unfit for this server."""
        one = self._find(reference) if key.may_use(reference.name) else None
        if isinstance(one, Found):
            assert self.versions is not None  # it was found there
            return one.line.revoked is None and not self.versions.unfit(one.line)
        return one is not None

    def present(self, key: Key) -> Mapping[str, Served]:
        """The adapters that ``key`` may use by their names alone and that are on this machine, with their names.

        What was found is kept until something changes: with a thousand names it is asked for at each request.
        """
        view = self.versions.view if self.versions else None
        # Nothing is taken out of `here`, and what its versions lead to is in the view.
        counts = (len(self.versions.here) if self.versions else 0, self._changes)
        kept = self._present.get(key.name)
        if kept is None or kept.key is not key or kept.view is not view or kept.counts != counts:
            kept = self._present[key.name] = _Present(key, view, counts, self._now_present(key))
        return kept.found

    def _now_present(self, key: Key) -> Mapping[str, Served]:
        found = {name: adapter for name, (adapter, _) in self._adapters.items() if key.may_use(name)}
        for name in self._of_registry():
            one = self._find(Reference(name)) if key.may_use(name) else None
            if isinstance(one, Found) and one.line.revoked is None and self.versions is not None:
                here = self.versions.here.get(one.line.id)
                if here is not None:
                    found[name] = here
        return found

    def cards(self, key: Key) -> Sequence[Card]:
        """What ``key`` may use: the base, adapters, aliases; and of a registry names and their aliases."""
        out = [Card(self.base, self.created, max_length=self.max_length)]
        for name, (adapter, created) in sorted(self._adapters.items()):
            if key.may_use(name):
                out.append(Card(name, created, self.base, adapter.parents, adapter.digest, self.max_length))
        for alias, mixture in self._aliases.items():
            if mixture is None:
                out.append(Card(str(alias), self.created, self.base, max_length=self.max_length))
                continue
            found = [(self._find(member), member, weight) for member, weight in mixture.members]
            if all(one is not None and key.may_use(member.name) for one, member, _ in found):
                single = found[0][0] if len(found) == 1 and found[0][2] == 1.0 else None
                digest = single.digest if isinstance(single, Served) else single.line.digest if single else None
                parents = {str(member): weight for member, weight in mixture.members}
                if isinstance(single, Served):
                    parents = dict(single.parents)
                out.append(Card(str(alias), self.created, self.base, parents, digest, self.max_length))
        for name in sorted(self._of_registry()):
            if key.may_use(name):
                out += self._cards_of(name)
        return out

    @property
    def adapters(self) -> Sequence[Served]:
        """All of them."""
        return [adapter for adapter, _ in self._adapters.values()]

    def add(self, adapter: Served) -> None:
        """Serve it from now on; what is there already with these very weights stays as it is.

        Raises:
            UserError: the name is taken, or none.
        """
        self.check_free(adapter.name)
        there = self._adapters.get(adapter.name)
        if there is None:
            self._adapters[adapter.name] = adapter, int(time.time())
            self._changes += 1
        elif there[0].digest != adapter.digest:
            raise UserError(
                f"an adapter {adapter.name!r} with other weights is served already; unload it first, or choose another"
            )

    def check_free(self, name: str, anew: bool = False) -> None:
        """Whether an adapter may be called ``name``, as far as the base and aliases go.

        Args:
            name: to be.
            anew: while this serves, when no name of the registry may change its meaning.

        Raises:
            UserError: it may not.
        """
        check_name(name)
        if name == self.base:
            raise UserError(f"{name!r} is the base's name; call the adapter otherwise, or the base (--name)")
        if name in self._gates:
            raise UserError(f"{name!r} is a gate's name; call the adapter otherwise, or the gate (--gate NAME=DIR)")
        if Reference(name) in self._aliases:
            raise UserError(f"{name!r} is an alias; call the adapter otherwise")
        if anew and self.versions and name in self.versions.view.snapshot.names and not self._taken(name):
            raise UserError(f"{name!r} is a name of the registry; push a version there, or call the adapter otherwise")

    def hidden(self) -> Sequence[str]:
        """What of the registry, sorted, is not served because something else here is called so: names (``clinic``), and
        aliases and versions of others (``clinic@staging``)."""
        names = self.versions.view.snapshot.names if self.versions else {}
        found = [name for name in names if self._taken(name)]
        for alias in self._aliases:
            name = names.get(alias.name) if alias.selector and not self._taken(alias.name) else None
            if name is not None and (alias.alias in name.pointers if alias.alias else name.exact(alias) is not None):
                found.append(str(alias))
        return sorted(found)

    def remove(self, key: Key, name: str) -> Served:
        """Serve it no longer; requests that have it keep it.

        Raises:
            UnknownModelError: there is no such adapter for ``key``.
        """
        may = key.may_use(name)
        if name not in self._adapters or not may:
            raise unknown(name)
        self._changes += 1
        return self._adapters.pop(name)[0]

    def read(self, name: str, path: str) -> Served:
        """The PEFT directory ``path``, which with its links followed lies under the roots.

        Raises:
            RequestError: it does not, or the name is none; whether there is anything at ``path`` is then not said.
            AdapterError: it is no adapter.
        """
        try:
            check_name(name)
        except UserError as error:
            raise RequestError(str(error), "lora_name") from None
        outside = RequestError(
            f"lora_path {path!r} is no directory under those that adapters may be loaded from (--lora-root)",
            "lora_path",
        )
        try:
            given = Path(path)
            found = next((root / given for root in self._roots if (root / given).exists()), given)
            directory = found.resolve()
            if not self._is_inside(directory):
                raise outside
            if directory.is_dir() and not all(self._is_inside(file.resolve()) for file in directory.iterdir()):
                raise outside
        except (ValueError, OSError, RuntimeError):  # a NUL, a name too long, a ring of links, no permission
            raise outside from None
        try:
            return served(name, directory)
        except AdapterError as error:  # where the root lies is nobody's business
            raise AdapterError(str(error).replace(str(directory), path)) from None

    def _is_inside(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)

    def _members(self, model: str) -> Sequence[tuple[Reference, float]]:
        if not is_mixture(model):
            try:
                reference = self._meant(parse_reference(model))
            except UserError:
                raise unknown(model) from None
            if reference in self._aliases:
                mixture = self._aliases[reference]
                return mixture.members if mixture else ()
            return ((reference, 1.0),)
        try:
            mixture = parse_mixture(model)
            mixture = Mixture(tuple((self._meant(reference), weight) for reference, weight in mixture.members))
        except UserError as error:
            raise RequestError(str(error), "model") from None
        if len(mixture.members) > self.most_members:
            raise RequestError(
                f"this mixture has {len(mixture.members)} members; at most {self.most_members} may be here", "model"
            )
        return [(self._through_alias(reference), weight) for reference, weight in mixture.members]

    def _meant(self, reference: Reference) -> Reference:
        """In a registry ``clinic_notes_v2`` is ``clinic_notes@v2``."""
        literal = self.versions is None or self._taken(reference.name)
        return reference if literal else meant(reference)

    def _through_alias(self, reference: Reference) -> Reference:
        """An alias of one adapter may be a member; one of a mixture is a member under no single weight, and unknown."""
        mixture = self._aliases.get(reference)
        if mixture and len(mixture.members) == 1 and mixture.members[0][1] == 1.0:
            return mixture.members[0][0]
        return reference

    def _find(self, reference: Reference, tenant: str = "", user: str = "") -> Served | Found | None:
        adapter = self._adapters.get(reference.name, (None,))[0]
        if adapter is None:
            if self.versions is None or reference.name in self._hiding:
                return None
            return self.versions.find(reference, tenant, user)
        if not reference.selector:
            return adapter
        return adapter if reference.digest and adapter.digest.startswith(reference.digest) else None

    def _served(self, one: Served | Found, model: str) -> Served:
        if isinstance(one, Served):
            return one
        assert self.versions is not None  # it was found there
        return self.versions.served(one, model)

    def _taken(self, name: str) -> bool:
        return name in self._adapters or name in self._hiding

    def _of_registry(self) -> Iterable[str]:
        names = self.versions.view.snapshot.names if self.versions else ()
        return [name for name in names if not self._taken(name)]

    def _cards_of(self, name: str) -> Iterable[Card]:
        """A name of the registry and its aliases, but for what is revoked or cannot be served here."""
        assert self.versions is not None
        versions, view = self.versions, self.versions.view
        for alias in sorted(view.snapshot.names[name].pointers):
            id = view.serving.get(Pointer(name, alias))
            line = None if id is None else view.snapshot.by_id[id]
            if (
                line is None
                or line.revoked is not None
                or (line.id in versions.failures and line.id not in versions.here)
            ):
                continue
            shown = Reference(name, alias)
            if shown in self._aliases:
                continue
            here, created = versions.here.get(line.id), int(datetime.fromisoformat(line.created).timestamp())
            yield Card(
                str(shown), created, self.base, here.parents if here else {}, line.digest, self.max_length,
                line.reference, versions.drift.get(line.id, {}),
            )  # fmt: skip

    def _alias(self, text: str, meaning: str) -> None:
        alias = parse_reference(text)
        if alias.digest:
            raise UserError(f"alias {text}: a digest names its weights; write a name, or name@word")
        if text == self.base:
            raise UserError(f"alias {text}: this is the base's name")
        if alias.name in self._gates:
            raise UserError(f"alias {text}: this is a gate's name")
        if meaning == self.base:
            self._aliases[alias] = None
            return
        try:
            mixture = parse_mixture(meaning)
        except UserError as error:
            raise UserError(f"alias {text}: {error}") from None
        if len(mixture.members) > self.most_members:
            raise UserError(
                f"alias {text}: {counted(len(mixture.members), 'member')}, at most {self.most_members} may be"
            )
        self._aliases[alias] = mixture


@dataclass(frozen=True)
class _Present:
    """What a key may use, as of one moment."""

    key: Key
    view: View | None
    counts: tuple[int, int]
    found: Mapping[str, Served]


def unknown(model: str) -> UnknownModelError:
    """The very same for what is not there and for what is another's."""
    return UnknownModelError(
        f"the model {model!r} does not exist, or this key may not use it; /v1/models lists what it may", model
    )
