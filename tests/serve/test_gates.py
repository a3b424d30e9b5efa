"""``model: <gate>``: the answer is that of the mixture that the header tells, and never another tenant's."""

from __future__ import annotations

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.serve.gates_world import BASE, NAMES, World, coefficients, gate_of, ids_of, mixture, write_adapters

from lorchestra.adapter.lineage import BaseId
from lorchestra.errors import AdapterError, UserError
from lorchestra.gate import store
from lorchestra.gate.features import FeatureSpec, features
from lorchestra.serve.adapter_files import served
from lorchestra.serve.choosing import Choosing, read_gate
from lorchestra.serve.engine import RequestError
from lorchestra.serve.routing import Router
from lorchestra.serve.vllm import VllmEngine
from lorchestra.serve.wire import CompletionRequest, parse

PROMPTS = ("hello there", "42", "什么是高血压？", "¿Qué tal?", "x" * 300, "A fairly long question, about nothing.")
SEEN = 5e-5  # of a coefficient: rounding of features in another forward pass, and to six digits


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def gates(directories):
    return {
        "triage": gate_of(directories),
        "few": gate_of(directories, "few", 1, top_k=2, none=True, spec=FeatureSpec(1)),
        "one": gate_of(directories, "one", 2, top_k=1, spec=FeatureSpec(2, last=True)),
        "open": gate_of(directories, "open", 3, activation="sigmoid", hidden=8),
        "line": gate_of(directories, "line", 4, activation="linear"),
    }


@pytest.fixture(scope="module")
def world(tiny_dir, directories, gates):
    with World(tiny_dir, directories, gates) as made:
        yield made


def wanted(gate, ids, allowed=None):
    """Its coefficients by the transformers model, alone."""
    x = features(make_tiny_model(), [ids], gate.spec.features)
    found = gate.coefficients(x, None if allowed is None else torch.tensor(allowed))[0].tolist()
    return {name: c for name, c in zip(gate.members, found, strict=True) if round(c, 6)}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["triage", "few", "one", "open", "line"])
def test_an_answer_is_that_of_the_mixture_that_the_header_tells(world, gates, name, chat):
    seen = set()
    for prompt in PROMPTS:
        choices, told, field = world.said(name, prompt, chat=chat, logprobs=True if chat else 2)
        ids = ids_of(prompt) if chat else make_tiny_tokenizer()(prompt)["input_ids"]
        assert told == pytest.approx(wanted(gates[name], ids), abs=SEEN)
        assert field["coefficients"] == told
        assert field["gate"] == name
        reference, none, nothing = world.said(mixture(told), prompt, chat=chat, logprobs=True if chat else 2)
        assert choices == reference
        assert none is None
        assert nothing is None
        seen.add(tuple(told.items()))
    assert len(seen) > 1  # or the prompts had no say


def test_in_one_batch_with_others_everybody_has_the_answer_that_it_has_alone(world):
    models = ("triage", "a", "few", "a=0.3+b=0.5", "base", "open", "one", "c", "line", "b=-0.4+c=1.2")
    asked = [(model, prompt) for prompt in PROMPTS[:3] for model in models]
    alone = [world.ask(model, prompt, tokens=20) for model, prompt in asked]
    with ThreadPoolExecutor(len(asked)) as many:
        together = list(many.map(lambda one: world.ask(*one, tokens=20), asked))
    for one, other in zip(alone, together, strict=True):
        assert other.json()["choices"] == one.json()["choices"]
        header = "x-lorchestra-coefficients"
        assert coefficients(other.headers.get(header)) == pytest.approx(coefficients(one.headers.get(header)), abs=SEEN)


def test_rows_carry_only_the_adapters_that_were_chosen(world):
    for name, most in (("few", 2), ("one", 1)):
        for prompt in PROMPTS:
            world.said(name, prompt)
            line = world.lines[-1]
            assert len(line["adapters"]) <= most
            assert all(member["coefficient"] for member in line["adapters"])
            assert (line["model"], line["gate"]) == (name, name)


def test_the_very_engine_is_given_only_those(world, monkeypatch):
    given = []
    real = world.engine._tokens.generate
    monkeypatch.setattr(world.engine._tokens, "generate", lambda one: given.append(one.members) or real(one))
    _, told, _ = world.said("few", "which two?")
    assert [(adapter.name, c) for adapter, c in given[0]] == list(told.items())


@pytest.mark.parametrize(("key", "own"), [("part", "ab"), ("rival", "c")])
@pytest.mark.parametrize("name", ["triage", "few", "one", "open", "line"])
def test_a_key_gets_its_own_members_alone_and_their_coefficients_as_if_no_other_were(world, gates, name, key, own):
    allowed = [member in own for member in NAMES]
    for prompt in PROMPTS:
        answer = world.ask(name, prompt, key=key, chat=True)
        told = coefficients(answer.headers["x-lorchestra-coefficients"])
        assert set(told) <= set(own)
        assert told == pytest.approx(wanted(gates[name], ids_of(prompt), allowed), abs=SEEN)
        assert "nearest" not in answer.json()["lorchestra"]  # they may be prompts of the others
        told_model = answer.headers.get("x-lorchestra-model", "")
        assert not any(f"{other}=" in f"+{told_model}" or told_model == other for other in set(NAMES) - set(own))
        assert {line["adapter"] for line in world.lines[-1]["adapters"]} == set(told)


def test_who_may_use_no_member_hears_what_they_hear_of_nothing(world):
    for name in ("triage", "few"):
        assert world.refused(name, key="bare") == (
            404,
            world.refused("nothing", key="bare")[1].replace("nothing", name),
        )
    assert "lorchestra_gate_choices" in world.page()


def test_the_list_of_models_has_gates_with_the_members_that_a_key_may_use(world):
    assert world.models()["triage"]["chooses"] == ["a", "b", "c"]
    assert world.models("part")["triage"]["chooses"] == ["a", "b"]
    assert world.models("rival")["few"]["chooses"] == ["c"]
    assert not {"triage", "few", "one"} & world.models("bare").keys()
    assert "chooses" not in world.models()["a"]
    assert "auto" not in world.models()


def test_nearest_training_prompts_are_told_to_those_who_may_use_every_member(world):
    _, _, field = world.said("triage")
    assert len(field["nearest"]) == 3
    first = field["nearest"][0]
    assert first["text"].startswith("training prompt")
    assert first["similarity"] >= field["nearest"][1]["similarity"]


@pytest.mark.parametrize("blank", ["  \n ", ""])
def test_a_prompt_without_text_is_the_bases(world, blank):
    choices, told, field = world.said("triage", blank, chat=True)
    assert told == {} == field["coefficients"]
    assert choices == world.said("base", blank, chat=True)[0]


def test_several_prompts_at_once_are_refused(world):
    status, said = world.refused("triage", prompt=["one", "two"])
    assert status == 400
    assert "'triage' chooses for one prompt" in said
    assert world.ask("triage", ["one"]).status_code == 200
    assert world.refused("triage", prompt="x" * 5000)[0] == 400


def test_a_stream_tells_it_in_its_head_and_its_first_part(world):
    import json

    whole, told, field = world.said("few", "a stream", tokens=12)
    body = {"model": "few", "prompt": "a stream", "max_tokens": 12, "temperature": 0, "stream": True}
    with world.client.stream("POST", "/v1/completions", json=body, headers={"authorization": "Bearer whole"}) as parts:
        assert coefficients(parts.headers["x-lorchestra-coefficients"]) == told
        chunks = [json.loads(line[6:]) for line in parts.iter_lines() if line.startswith("data: {")]
    assert chunks[0]["lorchestra"] == field
    assert not any("lorchestra" in chunk for chunk in chunks[1:])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole[0]["text"]


def test_choices_are_counted_by_gate_and_adapter(tiny_dir, directories):
    with World(tiny_dir, directories, {"one": gate_of(directories, "one", 2, top_k=1)}) as world:
        made = [next(iter(world.said("one", prompt)[1])) for prompt in PROMPTS]
        world.said("one", " ", chat=True)
        page = world.page()
    for name in set(made):
        line = f'lorchestra_gate_choices_total{{adapter="{name}",gate="one"}} {float(made.count(name))}'
        assert line in page
    assert 'lorchestra_gate_choices_total{adapter="base",gate="one"} 1.0' in page


def test_a_member_that_was_unloaded_is_no_candidate_and_a_gate_without_any_is_unknown(tiny_dir, directories, gates):
    with World(tiny_dir, directories, gates) as world:
        auth = {"authorization": "Bearer ops"}
        for gone in ("c", "a"):
            world.client.post("/v1/unload_lora_adapter", json={"lora_name": gone}, headers=auth)
            left = [name in {adapter.name for adapter in world.router.adapters} for name in NAMES]
            told = world.said("triage", chat=True)[1]
            assert told == pytest.approx(wanted(gates["triage"], ids_of("hello there"), left), abs=SEEN)
        assert told == {"b": 1.0}
        # Under the same name, with other weights: it is not the member that the gate was fitted on.
        world.router.add(served("a", directories["c"]))
        assert world.said("triage", chat=True)[1] == {"b": 1.0}
        world.client.post("/v1/unload_lora_adapter", json={"lora_name": "b"}, headers=auth)
        assert world.refused("triage")[0] == 404
        assert "triage" not in world.models()


def test_a_gate_is_no_member_of_a_mixture_and_nothing_else_has_its_name(world, directories, gates):
    assert world.refused("triage=0.5+a=0.5")[0] == 404
    for aliases, adapters in (({"triage": "a"}, []), ({}, [served("triage", directories["a"])])):
        with pytest.raises(UserError, match="gate's name"):
            Router("base", [served("a", directories["a"]), *adapters], aliases, gates={"triage"})
    with pytest.raises(UserError, match="gate's name"):
        world.router.check_free("triage")


def test_a_gate_whose_adapters_are_not_here_is_refused_at_the_start(directories, gates):
    two = [served(name, directories[name]) for name in "ab"]
    with pytest.raises(UserError, match=r"'c' with digest .* which is not here; serve that adapter"):
        Choosing(Router("base", two), None, gates)
    changed = [*two, served("c", directories["b"])]
    with pytest.raises(UserError, match="'c' with digest"):
        Choosing(Router("base", changed), None, gates)


def test_a_gate_that_cannot_be_served_is_refused_when_it_is_read(tmp_path, directories):
    place = store.save(gate_of(directories), tmp_path / "gate")
    assert read_gate("triage", place, BASE, 8).members == NAMES
    with pytest.raises(AdapterError, match="weights differ"):
        read_gate("triage", place, BaseId("other", "sha256:" + "f" * 64), 8)
    with pytest.raises(UserError, match=r"up to 3 adapters for an answer, and at most 2 may be here; .*--top-k 2"):
        read_gate("triage", place, BASE, 2)
    grouped = store.save(gate_of(directories, groups=("layers.0-0", "other")), tmp_path / "grouped")
    assert read_gate("triage", grouped, BASE, 8).spec.groups == ("layers.0-0", "other")
    shutil.copy(place / "gate.safetensors", grouped / "gate.safetensors")
    with pytest.raises(AdapterError, match="fetch the gate again"):
        read_gate("triage", grouped, BASE, 8)


def test_a_gate_that_makes_nan_is_an_error_and_no_answer(tiny_dir, directories):
    gate = gate_of(directories)
    gate.last.weight[0, 0] = torch.nan
    with World(tiny_dir, directories, {"triage": gate}) as world:
        status, said = world.refused("triage")
        assert status == 400
        assert "no finite coefficients" in said
        assert world.ask("a").status_code == 200


def test_the_engine_in_its_own_process_sees_the_same(tiny_dir, directories, gates):
    with World(tiny_dir, directories, gates, apart=True) as world:
        for name in gates:
            _, told, _ = world.said(name, "in another process", chat=True)
            assert told == pytest.approx(wanted(gates[name], ids_of("in another process")), abs=SEEN)


def test_vllm_has_no_gates():
    body = parse(CompletionRequest, {"model": "triage", "prompt": "x"})
    with pytest.raises(RequestError, match="--engine embedded"):
        asyncio.run(VllmEngine.features(object.__new__(VllmEngine), body, 0, False))
