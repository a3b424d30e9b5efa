"""Where a version came from and what came of it: the graph of parents and contexts.

A manifest names its parents by content digest, so the graph needs no links that could go stale. What a version was
made of need not be in the registry: such an adapter is a node without a version. What manifests claim is checked
nowhere else, so circles are possible here and end where they close.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.sql import ColumnElement

    from lorchestra.registry.manifest import Manifest, ParentEntry
    from lorchestra.registry.registry import Registry
    from lorchestra.registry.sql.catalog import Version

Kind = Literal["parent", "context"]
SHORT = 12  # hexadecimal digits of a digest as people see it
AT_ONCE = 500  # digests in one query


@dataclass(frozen=True)
class Node:
    """An adapter in the graph.

    Args:
        digest: of its folded factors.
        name: of the version (``clinic@v2``), or the one by which its descendants know it.
        version: ``None`` where the registry does not hold it.
        also: other versions of the registry with the same weights.
    """

    digest: str
    name: str
    version: Version | None = None
    also: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """``sha256:3f2a90c1b7de``."""
        return self.digest[: len("sha256:") + SHORT]


@dataclass(frozen=True)
class Edge:
    """``child`` was made from ``parent`` (a member of a fusion), or trained beside it (its context).

    Args:
        child: digest.
        parent: digest.
        kind: ``parent`` or ``context``.
        coefficient: of the parent in the sum.
    """

    child: str
    parent: str
    kind: Kind
    coefficient: float


@dataclass(frozen=True)
class Line:
    """One line of a tree: how deep, by which edge it was reached (``None`` for the root), and whether it was shown."""

    depth: int
    node: Node
    edge: Edge | None
    repeated: bool = False


@dataclass(frozen=True)
class Graph:
    """Some adapters and how they descend from one another.

    Args:
        nodes: digest → node.
        edges: from child to parent, in the order in which the manifests name them.
    """

    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]

    @classmethod
    def of(cls, versions: Iterable[Version]) -> Graph:
        """The graph of ``versions`` and of everything that their manifests name."""
        held: dict[str, list[Version]] = {}
        for version in sorted(versions, key=lambda version: version.id):
            held.setdefault(version.manifest.digest, []).append(version)
        nodes = {digest: _node(digest, same) for digest, same in held.items()}
        edges: dict[Edge, None] = {}  # keeps the order
        for digest, same in held.items():
            for version in same:
                for kind, entry in _entries(version.manifest):
                    nodes.setdefault(entry.digest, Node(entry.digest, entry.name))
                    edges.setdefault(Edge(digest, entry.digest, kind, entry.coefficient))
        return cls(nodes, tuple(edges))

    @cached_property
    def parents(self) -> Mapping[str, tuple[Edge, ...]]:
        """Child's digest → its edges upwards."""
        return _grouped(self.edges, _child)

    @cached_property
    def children(self) -> Mapping[str, tuple[Edge, ...]]:
        """Parent's digest → the edges that lead to it."""
        return _grouped(self.edges, _parent)

    def around(self, digest: str, *, ancestors: bool = True, descendants: bool = False) -> Graph:
        """The part that ``digest`` descends from, or that descends from it, itself included.

        Raises:
            KeyError: it is not in the graph.
        """
        kept = {digest: self.nodes[digest]}
        edges: dict[Edge, None] = {}
        for wanted, links, end in (
            (ancestors, self.parents, _parent),
            (descendants, self.children, _child),
        ):
            waiting, seen = [digest] if wanted else [], {digest}
            while waiting:
                for edge in links.get(waiting.pop(), ()):
                    edges.setdefault(edge)
                    kept[end(edge)] = self.nodes[end(edge)]
                    if end(edge) not in seen:
                        seen.add(end(edge))
                        waiting.append(end(edge))
        return Graph(kept, tuple(edge for edge in self.edges if edge in edges))

    def tree(self, digest: str, *, descendants: bool = False) -> Iterator[Line]:
        """Depth first from ``digest`` to its ancestors, or to its descendants.

        What was shown is shown again without what is above it: a graph of many paths stays a page long, and a circle
        ends.
        """
        links = self.children if descendants else self.parents
        shown = set[str]()
        waiting = [Line(0, self.nodes[digest], None)]
        while waiting:
            line = waiting.pop()
            repeated = line.node.digest in shown
            yield Line(line.depth, line.node, line.edge, repeated and line.node.digest in links)
            if repeated:
                continue
            shown.add(line.node.digest)
            for edge in reversed(links.get(line.node.digest, ())):
                other = edge.child if descendants else edge.parent
                waiting.append(Line(line.depth + 1, self.nodes[other], edge))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "nodes": [
                {
                    "digest": node.digest,
                    "name": node.name,
                    "held": node.version is not None,
                    "state": node.version.state if node.version else None,
                    "also": list(node.also),
                }
                for node in self.nodes.values()
            ],
            "edges": [
                {"child": edge.child, "parent": edge.parent, "kind": edge.kind, "coefficient": edge.coefficient}
                for edge in self.edges
            ],
        }

    def dot(self) -> str:
        """For Graphviz: from parents to children, contexts dashed, adapters that are not here dotted."""
        lines = ["digraph lineage {", "  rankdir=LR;", '  node [shape=box, fontname="sans-serif"];']
        for key, node in self._keyed():
            style = "" if node.version else ", style=dotted"
            lines.append(f"  {key} [label={_dot_text(_title(node))}{style}];")
        keys = {node.digest: key for key, node in self._keyed()}
        for edge in self.edges:
            style = ", style=dashed" if edge.kind == "context" else ""
            lines.append(f'  {keys[edge.parent]} -> {keys[edge.child]} [label="{edge.coefficient:g}"{style}];')
        return "\n".join([*lines, "}"])

    def mermaid(self) -> str:
        """For Mermaid (GitHub and GitLab draw it)."""
        lines = ["flowchart LR"]
        lines += [f'  {key}["{_mermaid_text(_title(node))}"]' for key, node in self._keyed()]
        keys = {node.digest: key for key, node in self._keyed()}
        for edge in self.edges:
            arrow = "-." if edge.kind == "context" else "--"
            head = ".->" if edge.kind == "context" else "-->"
            lines.append(f'  {keys[edge.parent]} {arrow} "{edge.coefficient:g}" {head} {keys[edge.child]}')
        away = [key for key, node in self._keyed() if node.version is None]
        if away:
            lines += ["  classDef away stroke-dasharray: 3 3", f"  class {','.join(away)} away"]
        return "\n".join(lines)

    def _keyed(self) -> Iterator[tuple[str, Node]]:
        """Nodes under identifiers that any language of graphs takes, whatever their names hold."""
        return ((f"n{k}", node) for k, node in enumerate(self.nodes.values()))


def related(registry: Registry, version: Version, *, ancestors: bool = True, descendants: bool = False) -> Graph:
    """What ``version`` descends from in ``registry``, or what descends from it: one query a generation, and chunk."""
    from lorchestra.registry.sql.schema import version_parents, versions

    def holding(digests: list[str]) -> ColumnElement[bool]:
        return versions.c.digest.in_(digests)

    def made_from(digests: list[str]) -> ColumnElement[bool]:
        from sqlalchemy import select

        children = select(version_parents.c.version_id).where(version_parents.c.digest.in_(digests))
        return versions.c.id.in_(children)

    found = {version.id: version}
    with registry.catalog.reading() as connection:
        for same in _held(connection, holding, [version.manifest.digest]):
            found[same.id] = same
        if ancestors:
            _climb(connection, holding, found, lambda one: [entry.digest for _, entry in _entries(one.manifest)])
        if descendants:
            _climb(connection, made_from, found, lambda one: [one.manifest.digest])
    around = Graph.of(found.values())
    return around.around(version.manifest.digest, ancestors=ancestors, descendants=descendants)


def _climb(
    connection: Connection,
    where: Callable[[list[str]], ColumnElement[bool]],
    found: dict[int, Version],
    step: Callable[[Version], list[str]],
) -> None:
    """Add to ``found`` everything that ``step`` leads to, generation by generation."""
    asked = set[str]()
    generation = list(found.values())
    while generation:
        digests = dict.fromkeys(digest for one in generation for digest in step(one) if digest not in asked)
        asked |= digests.keys()
        generation = [one for one in _held(connection, where, list(digests)) if one.id not in found]
        found |= {one.id: one for one in generation}


def _held(
    connection: Connection, where: Callable[[list[str]], ColumnElement[bool]], digests: list[str]
) -> Iterator[Version]:
    from lorchestra.registry.sql.finding import version_of, whole_of

    for start in range(0, len(digests), AT_ONCE):
        query = whole_of().where(where(digests[start : start + AT_ONCE]))
        yield from [version_of(row) for row in connection.execute(query)]


def _node(digest: str, same: list[Version]) -> Node:
    first, *others = same
    return Node(digest, first.manifest.reference, first, tuple(version.manifest.reference for version in others))


def _entries(manifest: Manifest) -> Iterator[tuple[Kind, ParentEntry]]:
    yield from (("parent", entry) for entry in manifest.parents)
    yield from (("context", entry) for entry in manifest.context)


def _parent(edge: Edge) -> str:
    return edge.parent


def _child(edge: Edge) -> str:
    return edge.child


def _grouped(edges: Iterable[Edge], key: Callable[[Edge], str]) -> Mapping[str, tuple[Edge, ...]]:
    found: dict[str, list[Edge]] = {}
    for edge in edges:
        found.setdefault(key(edge), []).append(edge)
    return {name: tuple(members) for name, members in found.items()}


def _title(node: Node) -> str:
    revoked = ", revoked" if node.version is not None and node.version.state == "revoked" else ""
    return f"{node.name or 'unnamed'}\n{node.short}{revoked}"


def _dot_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\r", " ").replace("\n", "\\n")
    return f'"{escaped}"'


def _mermaid_text(text: str) -> str:
    """Everything that is no letter, digit or harmless sign as a numbered entity; names may come from anywhere."""
    plain = set(" @:.,_-")
    first, _, second = text.rpartition("\n")
    return "<br/>".join(
        "".join(sign if sign.isalnum() or sign in plain else f"#{ord(sign)};" for sign in part)
        for part in (first, second)
    )
