"""Lineage: the graph of what versions say they were made of, against reachability by matrix powers."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.registry.lineage import Graph, related
from lorchestra.registry.manifest import Manifest
from lorchestra.registry.sql.catalog import Version


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def version(number: int, parents=(), context=(), name: str = "", id: int | None = None) -> Version:
    def entries(found):
        return [{"name": f"n{one}", "digest": digest(one), "coefficient": weight} for one, weight in found]

    manifest = Manifest(
        name=name or f"n{number}", number=1, digest=digest(number),
        files={"adapter_config.json": {"sha256": digest(0), "size": 1}}, base={}, ranks={}, scales={}, parameters=0,
        made_by="stage", stage="", task="", recipe={}, settings={}, data={}, parents=entries(parents),
        context=entries(context), metrics={}, tools={}, created="2026-01-01T00:00:00+00:00", created_by="t",
    )  # fmt: skip
    return Version(manifest, number if id is None else id, "ready", None)


graphs = st.integers(1, 8).flatmap(
    lambda n: st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1), st.booleans()), max_size=16).map(
        lambda edges: (n, edges)
    )
)


def made(n, edges) -> list[Version]:
    """Circles and self-loops too: anybody may claim anything."""
    return [
        version(
            k,
            parents=[(p, 0.5) for c, p, context in edges if c == k and not context],
            context=[(p, 2.0) for c, p, context in edges if c == k and context],
        )
        for k in range(n)
    ]


@given(graphs)
def test_ancestors_and_descendants_are_what_is_reachable(drawn):
    n, edges = drawn
    graph = Graph.of(made(n, edges))
    adjacent = np.eye(n, dtype=bool)
    for child, parent, _ in edges:
        adjacent[child, parent] = True
    reachable = np.linalg.matrix_power(adjacent.astype(int), n) > 0
    for k in range(n):
        up, down = graph.around(digest(k)), graph.around(digest(k), ancestors=False, descendants=True)
        assert set(up.nodes) == {digest(int(j)) for j in np.flatnonzero(reachable[k])}
        assert set(down.nodes) == {digest(int(j)) for j in np.flatnonzero(reachable[:, k])}
        assert {edge.child for edge in up.edges} <= set(up.nodes)
        for part, descendants in ((up, False), (down, True)):
            lines = list(part.tree(digest(k), descendants=descendants))
            assert {line.node.digest for line in lines} == set(part.nodes), "a tree shows all of it"
            assert len(lines) == len(part.edges) + 1, "every edge once"
            assert [line.depth for line in lines].count(0) == 1


def test_coefficients_kinds_and_what_is_not_here():
    graph = Graph.of([version(1), version(2, context=[(1, 0.3)]), version(3, parents=[(1, 0.7), (2, -0.2), (9, 1.0)])])
    assert [(e.child[-1], e.parent[-1], e.kind, e.coefficient) for e in graph.edges] == [
        ("2", "1", "context", 0.3), ("3", "1", "parent", 0.7), ("3", "2", "parent", -0.2), ("3", "9", "parent", 1.0)
    ]  # fmt: skip
    assert graph.nodes[digest(9)].version is None
    assert graph.nodes[digest(9)].name == "n9"
    assert graph.as_dict()["nodes"][-1] == {
        "digest": digest(9), "name": "n9", "held": False, "state": None, "also": []
    }  # fmt: skip
    lines = list(graph.tree(digest(3)))
    assert [(line.depth, line.node.name, line.repeated) for line in lines] == [
        (0, "n3@v1", False), (1, "n1@v1", False), (1, "n2@v1", False), (2, "n1@v1", False), (1, "n9", False)
    ]  # fmt: skip


def test_the_same_weights_under_two_names_are_one_node():
    graph = Graph.of([version(1, name="b", id=7), version(1, name="a", id=3), version(2, parents=[(1, 1.0)])])
    assert graph.nodes[digest(1)].name == "a@v1"
    assert graph.nodes[digest(1)].also == ("b@v1",)


def test_a_circle_ends():
    graph = Graph.of([version(1, parents=[(2, 1.0)]), version(2, parents=[(1, 1.0)])])
    assert [line.repeated for line in graph.tree(digest(1))] == [False, False, True]


HOSTILE = 'a"b\\c\n]; evil [label="x'


def test_hostile_names_stay_labels(tmp_path):
    one = version(2, parents=[(1, 1.0)])
    parent = one.manifest.parents[0].model_copy(update={"name": HOSTILE})
    graph = Graph.of([Version(one.manifest.model_copy(update={"parents": [parent]}), 2, "ready", None)])
    dot, mermaid = graph.dot(), graph.mermaid()
    assert len(dot.splitlines()) == 3 + 2 + 1 + 1
    assert len(mermaid.splitlines()) == 1 + 2 + 1 + 2
    label = re.search(r'n1 \[label="((?:[^"\\]|\\.)*)"', dot)
    assert label, "the quotes of the label are its own"
    assert label[1].startswith('a\\"b\\\\c\\n')
    assert 'label="x' not in mermaid
    assert "#34;" in mermaid
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg", "-o", tmp_path / "out.svg"], input=dot.encode(), check=True)


def test_from_a_registry(registry, make):
    terms = registry.push(make(1, name="terms"), "terms").manifest
    notes = registry.push(make(2, name="notes", context=[terms]), "notes").manifest
    fused = registry.push(make(3, made_by="fusion", parents=[terms, notes]), "clinic")
    registry.push(make(4), "other")
    again = registry.push(make(5, parents=[fused.manifest]), "clinic")
    registry.push(make(1, name="terms"), "glossary")  # the same weights under another name
    everything = Graph.of(registry.versions())
    for one in registry.versions():
        of = one.manifest.digest
        assert related(registry, one) == everything.around(of)
        down = related(registry, one, ancestors=False, descendants=True)
        assert down == everything.around(of, ancestors=False, descendants=True)
    assert {node.name for node in related(registry, again).nodes.values()} == {
        "clinic@v2", "clinic@v1", "terms@v1", "notes@v1"
    }  # fmt: skip


@pytest.mark.parametrize("descendants", [False, True])
def test_a_long_line_needs_no_recursion(descendants):
    n = 1500
    graph = Graph.of([version(k, parents=[(k - 1, 1.0)] if k else []) for k in range(n)])
    start = 0 if descendants else n - 1
    lines = list(graph.around(digest(start), ancestors=not descendants, descendants=descendants).tree(
        digest(start), descendants=descendants
    ))  # fmt: skip
    assert lines[-1].depth == n - 1
