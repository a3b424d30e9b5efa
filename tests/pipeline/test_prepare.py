"""What a run stands on: which sources are pinned, and what is told before anything is trained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tests.conftest import make_tiny_model

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.base.fingerprint import fingerprint
from lorchestra.base.home import home
from lorchestra.errors import RecipeError, SourceError
from lorchestra.events import Silent
from lorchestra.pipeline.prepare import examples_of, prepare
from lorchestra.pipeline.training import mixed_inputs, stage_digest, stage_inputs
from lorchestra.recipe.recipe import Recipe

COMMIT = "a" * 40


def on_the_hub(name, directory):
    """The snapshot of the hub repository org/``name``, as if it had been downloaded (the suite is offline)."""
    repository = home() / "hub" / f"models--org--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(directory, repository / "snapshots" / COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.fixture
def fetched(tiny_dir):
    return on_the_hub("name", tiny_dir)


def written(tmp_path, base, more="", stage=""):
    rows = [json.dumps({"prompt": f"question {i}?", "completion": "Yes."}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"name: x\nbase: {base}\nstages:\n  - {{name: a, data: data.jsonl{stage}}}\n{more}")
    return Recipe.load(file)


def adapter_of(model, base=None, lineage=None, paths=("q_proj",), seed=5):
    """A random adapter for the modules of ``model`` whose names end with one of ``paths``."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LowRank(
            torch.randn(module.out_features, 2, generator=generator) / 10,
            torch.randn(2, module.in_features, generator=generator) / 10,
        )
        for path, module in model.named_modules()
        if path.endswith(paths)
    }
    return Adapter(modules, base or BaseId(), lineage or Lineage())


class Listener(Silent):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def refusal(recipe, tmp_path):
    with pytest.raises(RecipeError) as error:
        prepare(recipe)
    return str(error.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("base", ["hf:org/name", "org/name"])
def test_hub_sources_are_locked_however_they_are_written(base, fetched, tmp_path):
    prepare(written(tmp_path, base))
    lock = tmp_path / "recipe.lock.json"
    assert list(json.loads(lock.read_text())["sources"]) == [base], "and a file of the user's own is not"
    lock.write_text(lock.read_text().replace("sha256:", "sha256:0"))
    with pytest.raises(SourceError, match="has changed since"):
        prepare(written(tmp_path, base))


def test_a_base_by_its_path_is_not_locked(tiny_dir, tmp_path):
    prepare(written(tmp_path, tiny_dir))
    assert not (tmp_path / "recipe.lock.json").exists()


def test_an_adapter_of_the_hub_is_locked(tiny_dir, tiny_model, tmp_path):
    adapter = adapter_of(tiny_model)
    snapshot = on_the_hub("style", adapter.save(tmp_path / "style"))
    prepare(written(tmp_path, tiny_dir, "adapters: {style: hf:org/style}\n"))
    assert json.loads((tmp_path / "recipe.lock.json").read_text())["sources"] == {"hf:org/style": adapter.digest}
    shutil.rmtree(snapshot)
    adapter_of(tiny_model, seed=6).save(snapshot)
    with pytest.raises(SourceError, match="has changed since"):
        prepare(written(tmp_path, tiny_dir, "adapters: {style: hf:org/style}\n"))


@pytest.mark.parametrize(
    ("stage", "more", "place"),
    [
        (", lora: {target_modules: [q_proj, v_prj]}", "", "4: stages.0.lora.target_modules"),
        ("", "lora: {target_modules: [q_proj, v_prj]}\n", "5: lora.target_modules"),
    ],
)
def test_modules_that_the_base_lacks_are_told_with_their_line(stage, more, place, tiny_dir, tmp_path):
    assert refusal(written(tmp_path, tiny_dir, more, stage), tmp_path) == (
        f"recipe.yaml:{place}: 'v_prj' matches no linear module; there are down_proj, gate_proj, k_proj, o_proj, "
        "q_proj, up_proj, v_proj; did you mean 'v_proj'?"
    )


def test_adapters_are_fitted_to_the_base(tiny_dir, tmp_path):
    adapter_of(make_tiny_model(hidden_size=64)).save(tmp_path / "wide")
    adapter_of(make_tiny_model(num_hidden_layers=3)).save(tmp_path / "deep")
    adapter_of(make_tiny_model(), base=BaseId("theirs", "sha256:0")).save(tmp_path / "other")
    message = refusal(written(tmp_path, tiny_dir, "adapters:\n  w: wide\n  d: deep\n  o: other\n"), tmp_path)
    wide, deep, other = message.splitlines()
    assert wide.startswith("recipe.yaml:6: adapters.w: adapter 'w' has an update of shape (64, 64) for")
    assert "a Linear of shape (32, 32). It belongs to another base" in wide
    assert deep.startswith("recipe.yaml:7: adapters.d: adapter 'd' changes 'model.layers.2.self_attn.q_proj', which")
    assert other.startswith(
        "recipe.yaml:8: adapters.o: adapter o was trained on theirs, whose weights are not those of"
    )


def test_what_an_adapter_does_not_say_or_says_otherwise_is_remarked(tiny_dir, tiny_model, tmp_path):
    base = fingerprint(tiny_dir, "tiny")
    adapter_of(tiny_model).save(tmp_path / "unsigned")
    adapter_of(tiny_model, BaseId("tiny", base.weights, base.tokenizer, "sha256:1")).save(tmp_path / "templated")
    adapter_of(tiny_model, base).save(tmp_path / "own")
    listener = Listener()
    prepare(written(tmp_path, tiny_dir, "adapters: {u: unsigned, t: templated, o: own}\n"), listener)
    assert listener.said[:2] == [
        "note: u does not say which weights it was trained on; only shapes are checked",
        "warning: t was trained with another chat template than this base has",
    ]


def test_last_without_the_context_of_an_adapter_is_told_before_training(tiny_dir, tiny_model, tmp_path):
    context = (Parent("gone", "sha256:2", 1.0),)
    adapter_of(tiny_model, lineage=Lineage("stage", "old", context=context)).save(tmp_path / "old")
    more = "adapters: {old: old}\nfusion: {members: [old], weights: last}\n"
    assert refusal(written(tmp_path, tiny_dir, more), tmp_path) == (
        "recipe.yaml:6: fusion.weights: 'old' was trained beside gone, which are not all members; make them members of "
        "the fusion, or give weights"
    )


def test_what_the_examples_settle_is_the_step_that_the_same_values_written_out_are(tmp_path, tiny_dir):
    """Also of a stage that is handed over as the recipe has it, and of the mixed baseline."""
    open_one = written(tmp_path, tiny_dir)
    prepared = prepare(open_one)
    stage = prepared.recipe.stages[0]
    assert {found.key: found.value for found in prepared.suggestions["a"]}["lora.rank"] == 8
    assert not prepared.recipe.open_keys(stage)
    assert prepared.recipe.text == open_one.text, "as it was written"
    by_hand = "lora: {rank: 8, alpha: 16, dropout: 0.1}, epochs: 6, learning_rate: 5e-4"
    explicit = prepare(written(tmp_path, tiny_dir, stage=f", {by_hand}, train: {{patience: 3}}"))
    assert [found.key for found in explicit.suggestions["a"]] == ["folds"]

    def digests(of, stage):
        inputs = (stage_inputs(of, stage, {}), mixed_inputs(of, tokens=10_000))
        return [stage_digest(of, one, "cpu", "float32") for one in inputs]

    expected = digests(explicit, explicit.recipe.stages[0])
    assert digests(prepared, stage) == expected
    assert digests(prepared, open_one.stages[0]) == expected


def test_tokens_to_learn_are_counted_by_answer(tmp_path, tiny_dir):
    """Bytes are tokens of the tiny tokenizer; a long answer is repeated less often, and a pair has two."""
    for length, epochs in ((31, 6.0), (32, 4.0)):  # and the end of the turn
        rows = [json.dumps({"prompt": f"question {i}?", "completion": "y" * length}) for i in range(40)]
        file = written(tmp_path, tiny_dir).path
        (tmp_path / "data.jsonl").write_text("\n".join(rows))
        prepared = prepare(Recipe.load(file))
        assert examples_of(prepared.data["a"]).tokens == length + 1
        assert prepared.recipe.train_of(prepared.recipe.stages[0]).epochs == epochs
    rows = [json.dumps({"prompt": f"question {i}?", "chosen": "y" * 9, "rejected": "n" * 19}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    pairs = prepare(Recipe.load(file, ["stages.a.task=dpo", "fusion.weights=equal"]))
    assert examples_of(pairs.data["a"]).tokens == 15
