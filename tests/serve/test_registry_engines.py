"""Both engines take a version on a sibling of its base where that is on record, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.serve.registry_world import BASE, write

from lorchestra.errors import AdapterError
from lorchestra.serve.adapter_files import served
from lorchestra.serve.embedded.residents import read_verified
from lorchestra.serve.engine import Target
from lorchestra.serve.vllm_adapters import Workshop

SIBLING = replace(BASE, name="tiny-awq", weights="sha256:" + "7" * 64)


@pytest.fixture
def version(tmp_path):
    found = served("clinic", write(tmp_path / "clinic", 1))
    return replace(found, reference="clinic@v1", version=1)


def test_the_embedded_engine(version):
    assert read_verified(version, BASE).digest == version.digest
    with pytest.raises(AdapterError, match="trained on a base"):
        read_verified(version, SIBLING)
    assert read_verified(replace(version, sibling_of=BASE.weights), SIBLING).digest == version.digest
    with pytest.raises(AdapterError, match="trained on a base"):
        read_verified(replace(version, sibling_of="sha256:" + "6" * 64), SIBLING)


def test_what_is_written_for_vllm(version, tiny_dir, tmp_path):
    workshop = Workshop(tiny_dir, SIBLING, tmp_path / "portable", 16)
    with pytest.raises(AdapterError, match="was trained on"):
        workshop._make("clinic@1", Target("clinic", ((version, 1.0),)))
    sibling = replace(version, sibling_of=BASE.weights)
    made = workshop._make(sibling.key, Target("clinic", ((sibling, 1.0),)))
    assert made.key == version.key, "a version is called by its weights, as any adapter"
    assert (made.directory / "adapter_model.safetensors").is_file()
