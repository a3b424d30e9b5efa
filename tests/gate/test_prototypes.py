"""What is kept of an adapter for routing: properties of ΔW and of prompts, in a file that is not trusted."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.gate.synthetic import adapter, plain

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.errors import AdapterError
from lorchestra.gate import prototypes
from lorchestra.gate.prototypes import DIRECTIONS, FILE, combined, directions, of_adapter, of_prompts
from lorchestra.registry.store.contents import Contents


def gram(found):
    return found.double().T @ found.double()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_directions_are_those_of_the_dense_stack_and_of_no_basis(seed, rank):
    one = adapter(rank=rank, seed=seed, dtype=torch.float64)
    dense = torch.cat([update.dense() for update in one.modules.values()])
    _, s, V = torch.linalg.svd(dense)
    wanted = V[:DIRECTIONS] * s[:DIRECTIONS, None]
    wanted = wanted / wanted.norm()
    found = directions(one, 2)
    assert torch.allclose(gram(found), gram(wanted), atol=1e-6)
    noise = torch.Generator().manual_seed(seed + 1)
    turned = {}
    for path, update in one.modules.items():
        M = torch.randn(rank, rank, generator=noise, dtype=torch.float64) + 3 * torch.eye(rank, dtype=torch.float64)
        turned[path] = LowRank(update.B @ M, torch.linalg.inv(M) @ update.A)
    assert torch.allclose(gram(directions(Adapter(turned), 2)), gram(found), atol=1e-6)


def test_directions_are_of_what_reads_the_features_alone():
    assert directions(adapter(layer=1), 0).shape == (0, 0)
    assert directions(adapter(layer=11), 1).shape == (0, 0)
    assert directions(adapter(layer=1) * 0.0, 1).shape == (0, 0)
    assert directions(adapter(layer=0), 0).shape == (8, 24)


def test_prompts_become_centroids_and_their_scatter():
    noise = torch.Generator().manual_seed(0)
    places = 10 * torch.randn(3, 24, generator=noise)
    x = torch.cat([place + plain(140, 24, noise) for place in places])
    found = of_prompts(adapter(), x)
    assert found.prompts == 420
    assert len(found.centroids) == 4
    for place in places:  # every place has a centroid near it
        assert float((found.centroids - place).norm(dim=1).min()) < 3
    few = of_prompts(adapter(), x[:60])
    assert len(few.centroids) == 1
    assert torch.allclose(few.centroids[0], x[:60].mean(dim=0), atol=1e-5)
    scatter = (x[:60] - x[:60].mean(dim=0)).double()
    assert torch.allclose(few.variance.double(), scatter.square().mean(dim=0), atol=1e-5)
    values = torch.linalg.eigvalsh(scatter.T @ scatter / 60).flip(0)[:16]
    assert torch.allclose(few.axes.double().square().sum(dim=1), values, rtol=1e-4)
    assert torch.equal(of_prompts(adapter(), x).centroids, found.centroids)


def test_a_fusion_is_for_the_prompts_of_all_its_members():
    noise = torch.Generator().manual_seed(0)
    first, second = plain(60, 24, noise), plain(40, 24, noise) + 5
    whole = adapter(seed=9)
    found = combined(whole, [of_prompts(adapter(seed=1), first), of_prompts(adapter(seed=2), second)])
    assert found.adapter == whole.digest
    assert found.prompts == 100
    assert torch.allclose(found.centroids, torch.stack([first.mean(dim=0), second.mean(dim=0)]), atol=1e-5)
    inside = torch.cat([first - first.mean(dim=0), second - second.mean(dim=0)])
    assert torch.allclose(found.variance, inside.square().mean(dim=0), rtol=1e-4)


@pytest.mark.parametrize("with_prompts", [True, False])
def test_what_is_written_is_read(tmp_path, with_prompts):
    one = adapter()
    known = of_prompts(one, torch.randn(30, 24)) if with_prompts else of_adapter(one)
    prototypes.save(known, tmp_path)
    read = prototypes.load(tmp_path, one.digest)
    assert (read.adapter, read.features, read.prompts) == (known.adapter, known.features, known.prompts)
    for name in ("directions", "centroids", "variance", "axes"):
        assert torch.equal(getattr(read, name), getattr(known, name))
    assert prototypes.load(tmp_path / "elsewhere", one.digest) is None


def test_a_file_beside_other_weights_is_refused(tmp_path):
    prototypes.save(of_adapter(adapter()), tmp_path)
    with pytest.raises(AdapterError, match="remove the file"):
        prototypes.load(tmp_path, adapter(seed=1).digest)


def damaged(path, **changed):
    """The file, with other things in its header."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    told = json.loads(header["__metadata__"]["prototype"]) | changed
    header["__metadata__"]["prototype"] = json.dumps(told)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(b""), "1 to"),
        (lambda path: path.write_bytes(b"\x80\x04pickle"), "is no file of prototypes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is no file of prototypes"),
        (lambda path: os.truncate(path, 17 << 20), "bytes; prototypes have"),
        (lambda path: damaged(path, format=2), "its format is 2"),
        (lambda path: damaged(path, extra=1), "what it says of itself"),
        (lambda path: damaged(path, layers=-1), "what it says of itself"),
        (lambda path: damaged(path, prompts="many"), "what it says of itself"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, harm, said):
    one = adapter()
    harm(prototypes.save(of_prompts(one, torch.randn(30, 24)), tmp_path))
    with pytest.raises(AdapterError, match=said):
        prototypes.load(tmp_path, one.digest)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("centroids", torch.full((1, 24), torch.nan), "NaN"),
        ("centroids", torch.ones(1, 7), "belong together"),
        ("variance", torch.ones(2, 12), "belong together"),
        ("directions", torch.ones(2, 24, dtype=torch.float16), "not directions"),
        ("centroids", torch.empty(0, 0), "go together"),
    ],
)
def test_tensors_that_make_no_prototype_are_refused(tmp_path, name, value, said):
    from dataclasses import replace

    one = adapter()
    prototypes.save(replace(of_prompts(one, torch.randn(30, 24)), **{name: value}), tmp_path)
    with pytest.raises(AdapterError, match=said):
        prototypes.load(tmp_path, one.digest)


def test_features_that_are_none_make_no_prototype():
    for x in (torch.empty(0, 24), torch.full((3, 24), torch.inf)):
        with pytest.raises(AdapterError, match="at least one prompt"):
            of_prompts(adapter(), x)


def test_the_file_is_pushed_with_its_adapter(tmp_path):
    one = adapter()
    one.save(tmp_path / "a")
    prototypes.save(of_adapter(one), tmp_path / "a")
    with Contents.of(tmp_path / "a") as contents:
        assert FILE in contents.files
