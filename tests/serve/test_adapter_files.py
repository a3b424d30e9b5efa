"""What an adapter's directory brings along."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from tests.serve.tenants import write_adapter

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Parent
from lorchestra.errors import AdapterError, UserError
from lorchestra.serve.adapter_files import LARGEST, found_in, served


def test_digest_parents_template_prompt_and_defaults(tmp_path):
    parents = (Parent("general", "sha256:" + "1" * 64, 0.3), Parent("clinic", "sha256:" + "2" * 64, -0.5))
    directory = write_adapter(tmp_path / "a", 1, parents)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "serve.yaml").write_text("system_prompt: Be brief.\nsampling: {temperature: 0.2, max_tokens: 40}\n")
    found = served("team", directory)
    assert found.digest == Adapter.load(directory).digest
    assert found.parents == {"general": 0.3, "clinic": -0.5}
    assert found.chat_template == "{{ messages }}"
    assert found.system_prompt == "Be brief."
    assert found.defaults == {"temperature": 0.2, "max_tokens": 40}


def test_a_bare_adapter_brings_nothing(tmp_path):
    found = served("a", write_adapter(tmp_path / "a", 1))
    assert (found.parents, found.chat_template, found.system_prompt, found.defaults) == ({}, None, None, {})


def test_another_tools_directory_has_the_digest_that_its_weights_have(tmp_path):
    directory = write_adapter(tmp_path / "a", 1)
    (directory / "lorchestra.json").unlink()
    assert served("a", directory).digest == Adapter.load(directory).digest


def test_two_parents_of_one_name_are_told_apart(tmp_path):
    parents = (Parent("a", "sha256:" + "1" * 64, 0.3), Parent("a", "sha256:" + "2" * 64, 0.7))
    assert sorted(served("x", write_adapter(tmp_path / "a", 1, parents)).parents.values()) == [0.3, 0.7]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("serve.yaml", "system_prompt: 3", "system_prompt is a text"),
        ("serve.yaml", "sampling: {temperature: hot}", "temperature"),
        ("serve.yaml", "sampling: {heat: 1}", "heat"),
        ("serve.yaml", "sampling: [1]", "sampling is a mapping"),
        ("serve.yaml", "prompt: x", "nothing else"),
        ("serve.yaml", "a: [", "not YAML"),
        ("serve.yaml", "x" * (LARGEST + 1), "at most"),
        ("lorchestra.json", "{", "damaged"),
        ("lorchestra.json", "[]", "damaged"),
        ("lorchestra.json", json.dumps({"digest": "sha256:1", "lineage": {"parents": [3]}}), "damaged"),
        ("lorchestra.json", json.dumps({"digest": "sha256:1", "lineage": 3}), "damaged"),
    ],
)
def test_what_is_wrong_beside_the_weights_is_told_of(tmp_path, name, text, says):
    directory = write_adapter(tmp_path / "a", 1)
    (directory / name).write_text(text)
    with pytest.raises(AdapterError, match=says):
        served("a", directory)


def test_a_directory_without_an_adapter(tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        served("a", tmp_path)
    directory = write_adapter(tmp_path / "a", 1)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        served("a", directory)
    with pytest.raises(UserError, match="no name"):
        served("../a", directory)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda place: (place / "adapter_config.json").write_text('{"r": 8,'), "adapter_config.json cannot be read"),
        (lambda place: (place / "adapter_config.json").write_text("[]"), "should hold a JSON object"),
        (lambda place: edited(place, use_dora=True), "DoRA"),
        (lambda place: cut(place / "adapter_model.safetensors", 40), "damaged or not a safetensors file"),
        (lambda place: cut(place / "adapter_model.safetensors", 4), "damaged or not a safetensors file"),
        (lambda place: (place / "adapter_model.safetensors").rename(place / "adapter_model.bin"), "is a pickle"),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_what_could_never_be_loaded_is_told_at_once(tmp_path, break_it, says, ours):
    """Before a server starts, though nobody may ask for this adapter for a week."""
    directory = write_adapter(tmp_path / "a", 1)
    if not ours:
        (directory / "lorchestra.json").unlink()
    break_it(directory)
    with pytest.raises(AdapterError, match=rf"^adapter clinic: .*{says}"):
        served("clinic", directory)


def edited(place, **changes):
    file = place / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file, end):
    file.write_bytes(file.read_bytes()[:-end] if end > 10 else file.read_bytes()[:end])


def test_the_base_that_it_was_trained_on(tmp_path):
    adapter = replace(Adapter.load(write_adapter(tmp_path / "a", 1)), base=BaseId("x", "sha256:" + "3" * 64))
    assert served("a", adapter.save(tmp_path / "b")).base == "sha256:" + "3" * 64
    (tmp_path / "b" / "lorchestra.json").unlink()
    assert served("a", tmp_path / "b").base == ""


def test_a_directory_of_adapters(tmp_path):
    write_adapter(tmp_path / "clinic", 1)
    write_adapter(tmp_path / "audit", 2)
    (tmp_path / "notes").mkdir()
    assert found_in(tmp_path) == {"audit": tmp_path / "audit", "clinic": tmp_path / "clinic"}
    with pytest.raises(UserError, match="is an adapter itself"):
        found_in(tmp_path / "clinic")
    with pytest.raises(UserError, match="holds no PEFT directory"):
        found_in(tmp_path / "notes")
    with pytest.raises(UserError, match="no directory"):
        found_in(tmp_path / "nowhere")
    shutil.copytree(tmp_path / "clinic", tmp_path / "a b")
    with pytest.raises(UserError, match="rename"):
        found_in(tmp_path)


def test_an_adapter_one_level_down_is_pointed_to(tmp_path):
    write_adapter(tmp_path / "run" / "adapter", 1)
    with pytest.raises(AdapterError, match=r"did you mean .*run/adapter\?"):
        served("a", tmp_path / "run")
