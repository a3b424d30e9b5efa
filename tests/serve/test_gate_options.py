"""``lorchestra serve --gate`` and ``--auto``: what the command line and the configuration file make of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from tests.serve.gates_world import gate_of, write_adapters

from lorchestra.adapter.lineage import BaseId
from lorchestra.base.fingerprint import fingerprint
from lorchestra.cli import serve_engine, serve_gates
from lorchestra.console.playground import _events
from lorchestra.errors import AdapterError, SourceError, UserError
from lorchestra.events import SILENT
from lorchestra.gate import store
from lorchestra.serve.config import ServeConfig
from lorchestra.serve.engine import Choice, Chunk, Served, Target, Usage
from lorchestra.serve.responses import answered_by, chosen


@pytest.fixture
def delivered(tiny_dir, tmp_path):
    """A gate with its adapters beside it, as a run delivers them."""
    directories = write_adapters(tmp_path / "gate" / "adapters")
    place = tmp_path / "gate"
    made = store.save(gate_of(directories, base=fingerprint(tiny_dir, "tiny")), tmp_path / "made")
    for file in made.iterdir():
        file.rename(place / file.name)
    return place


def test_paths_of_gates_are_the_files_neighbours_and_flags_are_added(tmp_path):
    (tmp_path / "serve.yaml").write_text("base: x\ngates: {triage: gates/triage}\nauto: true\nauto_top_k: 2\n")
    config = ServeConfig.load(tmp_path / "serve.yaml").with_flags({"gates": {"other": "here"}})
    assert config.gates == {"triage": str(tmp_path / "gates/triage"), "other": "here"}
    assert (config.auto, config.auto_top_k, config.with_flags({"auto": False}).auto) == (True, 2, False)
    with pytest.raises(UserError, match="keep one of them"):
        config.with_flags({"gates": {"triage": "there"}})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"auto_top_k": 9}, "auto_top_k is 9, and at most max_mixture: 8"),
        ({"auto_gate": "triage"}, "auto_gate is 'triage', which is none of gates: none"),
    ],
)
def test_what_does_not_go_together(settings, says):
    with pytest.raises(UserError, match=says):
        ServeConfig(base="x", **settings).check()


def test_a_delivered_gate_brings_its_adapters_along_and_other_ones_of_the_name_win(delivered, tiny_dir, tmp_path):
    config = ServeConfig(base=str(tiny_dir), gates={"triage": str(delivered)})
    found = serve_gates.gates(config, SILENT)
    places = {"a": tmp_path / "elsewhere"}
    serve_gates.add_members(config, found, places, None)
    assert places == {"a": tmp_path / "elsewhere", "b": delivered / "adapters" / "b", "c": delivered / "adapters" / "c"}


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"gates": {"auto": "x"}}, UserError, "reserved"),
        ({"gates": {"a/b": "x"}}, UserError, "no name"),
        ({"gates": {"base": "x"}, "name": "base"}, UserError, "a gate and something else"),
        ({"gates": {"clinic": "x"}, "adapters": {"clinic": "y"}}, UserError, "a gate and something else"),
        ({"gates": {"triage": "nowhere"}}, SourceError, "nowhere"),
    ],
)
def test_gates_that_are_none(tiny_dir, settings, error, says):
    with pytest.raises(error, match=says):
        serve_gates.gates(ServeConfig(base=str(tiny_dir), **settings), SILENT)


def test_a_gate_of_another_base_is_refused_before_the_base_is_loaded(tiny_dir, tmp_path):
    gate = gate_of(write_adapters(tmp_path / "adapters"), base=BaseId("other", "sha256:" + "0" * 64))
    place = store.save(gate, tmp_path / "gate")
    with pytest.raises(AdapterError, match="other, whose weights differ"):
        serve_gates.gates(ServeConfig(base=str(tiny_dir), gates={"triage": str(place)}), SILENT)


@pytest.mark.parametrize("settings", [{"auto": True}, {"gates": {"triage": "x"}}])
def test_vllm_serves_neither(tiny_dir, settings):
    with pytest.raises(UserError, match="--engine embedded, or leave --gate and --auto out"):
        serve_engine.engine(ServeConfig(base=str(tiny_dir), engine="vllm", **settings), None, SILENT)


def test_nothing_chooses_unless_it_is_asked_for():
    assert serve_gates.choosing(ServeConfig(base="x"), None, None, {}) is None
    assert serve_gates.gates(ServeConfig(base="x"), SILENT) == {}


def test_the_console_shows_the_choice_with_the_first_part_of_an_answer():
    target = Target("triage", choice=Choice("triage", {"a": 0.25}, ({"digest": "sha256:0", "similarity": 0.5},)))

    async def told():
        async def rest():
            yield Chunk([{"text": "two"}], Usage(1, 2))

        first = Chunk([{"text": "one"}], Usage(1, 1), target)
        return [json.loads(part[6:]) async for part in _events(first, rest(), "id")]

    first, second, end = asyncio.run(told())
    assert first["lorchestra"] == {
        "gate": "triage", "coefficients": {"a": 0.25}, "nearest": [{"digest": "sha256:0", "similarity": 0.5}]
    }  # fmt: skip
    assert "lorchestra" not in second
    assert end == {"end": True}


def test_what_is_told_of_groups_of_layers():
    members = ((Served("a", "sha256:0", Path("a")), 0.25), (Served("b", "sha256:1", Path("b"), reference="b@v2"), 0.5))
    layers = {"layers.0-9": (0.5, 0.0), "layers.10-19": (0.0, 1.0), "other": (0.0, 0.0)}
    told = {"layers.0-9": {"a": 0.5}, "layers.10-19": {"b": 1.0}, "other": {}}
    target = Target("triage", members, choice=Choice("triage", {"a": 0.25, "b": 0.5}, (), told), layers=layers)
    assert answered_by(target) == {
        "x-lorchestra-model": "layers.0-9:a=0.5;layers.10-19:b@v2=1.0;other:none",
        "x-lorchestra-coefficients": "layers.0-9:a=0.5;layers.10-19:b=1.0;other:none",
    }
    assert chosen(target) == {
        "lorchestra": {"gate": "triage", "coefficients": {"a": 0.25, "b": 0.5}, "layers": told}
    }  # fmt: skip
    # A mean of 1 is not an adapter at 1.
    one = Target("triage", ((members[0][0], 1.0),), layers={"layers.0-9": (0.5,), "layers.10-19": (1.5,)})
    assert one.single is None
    assert answered_by(one) == {"x-lorchestra-model": "layers.0-9:a=0.5;layers.10-19:a=1.5"}
