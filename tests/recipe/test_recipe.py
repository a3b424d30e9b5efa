# ruff: noqa: E501  (a message in one line is easier to read)
"""A recipe says what it means, and what is wrong with it: file, line, key, and what to write instead."""

from __future__ import annotations

import re

import pytest

from lorchestra.errors import RecipeError
from lorchestra.recipe.gate import Gate, candidates, suggest_activation
from lorchestra.recipe.recipe import Recipe

GOOD = """\
name: tiny
base: ./tiny
max_length: 96
split: {train: 0.6, validation: 0.2, test: 0.2}
lora: {rank: 2, alpha: 4}
train:
  max_steps: 6
  batch_size: 4
stages:
  - name: general
    data: general.jsonl
  - name: clinic
    data: clinic.jsonl
    context: {general: 1.0}
  - name: preference
    task: dpo
    data: pairs.jsonl
    context:
      general: {weight: 1.0, schedule: cosine, to: 0.5}
      clinic: 1.0
fusion: {candidates: 8}
evaluate: {samples: 2}
"""
CLINIC = "    context: {general: 1.0}"  # line 14
STAGES = GOOD[GOOD.index("stages:") : GOOD.index("fusion:")]


@pytest.fixture
def load(tmp_path):
    """Write a text as ``tmp_path/r.yaml`` and load it."""

    def read(text=GOOD, *overrides):
        (tmp_path / "r.yaml").write_text(text)
        return Recipe.load(tmp_path / "r.yaml", overrides)

    return read


def refusal(load, tmp_path, text, *overrides) -> str:
    """The message, without the directory."""
    with pytest.raises(RecipeError) as error:
        load(text, *overrides)
    message = str(error.value).replace(f"{tmp_path}/", "")
    assert not re.search(r"pydantic|validation error|\bdictionary\b|\btuple\b|instance of|Input should", message)
    return message


# What is replaced, by what, and the whole message.
MISTAKES = {
    "unknown key": ("max_length", "max_lenght", "r.yaml:3: max_lenght: unknown key 'max_lenght'; did you mean 'max_length'?"),
    "in a section": ("batch_size", "batchsize", "r.yaml:8: train.batchsize: unknown key 'batchsize'; did you mean 'batch_size'?"),
    "in a stage": ("    context: {general", "    contxt: {general", "r.yaml:14: stages.1.contxt: unknown key 'contxt'; did you mean 'context'?"),
    "in a context": ("to: 0.5", "too: 0.5", "r.yaml:19: stages.2.context.general.too: unknown key 'too'; did you mean 'to'?"),
    "shorthand's neighbour": (CLINIC, "    epoch: 3", "r.yaml:14: stages.1.epoch: unknown key 'epoch'; did you mean 'epochs'?"),
    "belongs elsewhere": (CLINIC, "    batch_size: 8", "r.yaml:14: stages.1.batch_size: unknown key 'batch_size' here; it belongs under train"),
    "belongs in a stage": ("max_length: 96", "context: [general]", "r.yaml:3: context: unknown key 'context' here; it belongs in an entry of stages"),
    "belongs at the top": ("  batch_size: 4", "  max_length: 4", "r.yaml:8: train.max_length: unknown key 'max_length' here; it belongs at the top of the recipe"),
    "a word of one": (CLINIC, "    steps: 3", "r.yaml:14: stages.1.steps: unknown key 'steps'; did you mean 'max_steps'?"),
    "near one elsewhere": ("max_length: 96", "batchsize: 3", "r.yaml:3: batchsize: unknown key 'batchsize'; did you mean 'batch_size'? It belongs under train"),
    "data entry": ("data: clinic.jsonl", "data: {source: clinic.jsonl, limt: 3}", "r.yaml:13: stages.1.data.limt: unknown key 'limt'; did you mean 'limit'?"),
    "stage override": (CLINIC, "    lora: {rnk: 3}", "r.yaml:14: stages.1.lora.rnk: unknown key 'rnk'; did you mean 'rank'?"),
    "whole number": ("max_length: 96", "max_length: many", "r.yaml:3: max_length: expected a whole number, got 'many'"),
    "fraction": ("max_length: 96", "max_length: 96.5", "r.yaml:3: max_length: expected a whole number, got 96.5"),
    "too small": ("max_length: 96", "max_length: 2", "r.yaml:3: max_length: expected at least 8, got 2"),
    "negative": ("batch_size: 4", "learning_rate: -1", "r.yaml:8: train.learning_rate: expected more than 0, got -1"),
    "infinite": ("batch_size: 4", "learning_rate: .inf", "r.yaml:8: train.learning_rate: expected a finite number, got inf"),
    "not a number": (CLINIC, "    learning_rate: fast", "r.yaml:14: stages.1.learning_rate: expected a number, got 'fast'"),
    "text": ("base: ./tiny", "base: 7", "r.yaml:2: base: expected a text, got 7; put it in quotes: '7'"),
    "text, list": ("base: ./tiny", "base: [a, b]", "r.yaml:2: base: expected a text, got ['a', 'b']"),
    "mapping": (CLINIC, "    lora: [1, 2]", "r.yaml:14: stages.1.lora: expected a mapping (key: value), got [1, 2]"),
    "list": ("fusion: {candidates: 8}", "fusion: {members: general}", "r.yaml:21: fusion.members: expected a list, got 'general'; write [general]"),
    "one of": ("task: dpo", "task: dop", "r.yaml:16: stages.2.task: expected one of sft, dpo, got 'dop'; did you mean 'dpo'?"),
    "one of or more": ("candidates: 8", "weights: serch", "r.yaml:21: fusion.weights: expected one of search, equal, later, specialised, last or a mapping (key: value), got 'serch'; did you mean 'search'?"),
    "inside a union": ("candidates: 8", "weights: {general: lots}", "r.yaml:21: fusion.weights.general: expected a number, got 'lots'"),
    "not finite weight": ("candidates: 8", "weights: {general: .nan}", "r.yaml:21: fusion.weights.general: expected a finite number, got nan"),
    "device": ("max_length: 96", "device: gpu", "r.yaml:3: device: expected auto, cpu, cuda, cuda:0 … or mps, got 'gpu'"),
    "base missing": ("base: ./tiny\n", "", "r.yaml: base: the key 'base' is missing"),
    "stages missing": (STAGES, "", "r.yaml: stages: the key 'stages' is missing"),
    "no stages": (STAGES, "stages: []\n", "r.yaml:9: stages: expected at least 1 of them, got []"),
    "stages as mapping": (STAGES, "stages: {general: {data: x}}\n", "r.yaml:9: stages: expected a list, got a mapping with general; begin each entry with '- '"),
    "stage without data": ("    data: clinic.jsonl\n", "", "r.yaml:12: stages.1.data: the key 'data' is missing"),
    "stage with empty data": ("    data: clinic.jsonl\n", "    data:\n", "r.yaml:13: stages.1.data: the key 'data' is missing"),
    "sums": ("test: 0.2", "test: 0.3", "r.yaml:4: split: train + validation + test must be 1; they are 1.1"),
    "beta of sft": (CLINIC, "    beta: 0.2", "r.yaml:12: stages.1: 'beta' belongs to task: dpo; this stage is sft"),
    "both lengths": (CLINIC, "    train: {epochs: 3, max_steps: 2}", "r.yaml:14: stages.1.train: give epochs or max_steps, not both"),
    "both lengths above": ("  batch_size: 4", "  epochs: 2", "r.yaml:6: train: give epochs or max_steps, not both"),
    "twice": (CLINIC, "    epochs: 1\n    train: {epochs: 2}", "r.yaml:12: stages.1: 'epochs' stands on the stage and again in its train; keep one of them"),
    "context unknown": (CLINIC, "    context: {genral: 1.0}", "r.yaml:14: stages.1.context.genral: context 'genral' names no earlier stage or adapter; did you mean 'general'?"),
    "context itself": (CLINIC, "    context: {clinic: 1.0}", "r.yaml:14: stages.1.context.clinic: stage 'clinic' cannot be its own context"),
    "cycle": (CLINIC, "    context: {preference: 1.0}", "r.yaml:14: stages.1.context.preference: context 'preference' comes later than 'clinic'; a context names earlier stages (this would be a cycle)"),
    "schedule ends first": ("to: 0.5", "to: 0.5, start: 0.9, end: 0.2", "r.yaml:19: stages.2.context.general: start (0.9) must come before end (0.2)"),
    "member unknown": ("candidates: 8", "members: [general, clinik]", "r.yaml:21: fusion.members: 'clinik' is no stage or adapter of this recipe; did you mean 'clinic'?"),
    "member twice": ("candidates: 8", "members: [general, general]", "r.yaml:21: fusion.members: 'general' is here twice"),
    "goal unknown": ("candidates: 8", "goal: best", "r.yaml:21: fusion.goal: expected one of mean, worst or a mapping (key: value), got 'best'"),
    "goal of nobody": ("candidates: 8", "goal: {clinik: 1}", "r.yaml:21: fusion.goal.clinik: 'clinik' is no stage of this recipe; did you mean 'clinic'?"),
    "goal of nothing": ("candidates: 8", "goal: {clinic: 0}", "r.yaml:21: fusion.goal: no domain counts; give one of them at least a weight (general, clinic, preference)"),
    "goal below zero": ("candidates: 8", "goal: {clinic: -1}", "r.yaml:21: fusion.goal.clinic: expected at least 0, got -1"),
    "limit below zero": ("candidates: 8", "tolerance: -0.1", "r.yaml:21: fusion.tolerance: expected at least 0, got -0.1"),
    "one fold": ("candidates: 8", "folds: 1", "r.yaml:21: fusion.folds: expected at least 2, got 1"),
    "rule unknown": ("candidates: 8", "rule: best", "r.yaml:21: fusion.rule: expected one of one_se, minimum, got 'best'"),
    "strategy unknown": ("candidates: 8", "strategy: gradients", "r.yaml:21: fusion.strategy: expected one of gradient, surrogate, tpe, cmaes, sobol, grid, heuristics, got 'gradients'; did you mean 'gradient'?"),
    "grid with a number": ("candidates: 8", "candidates: 8, strategy: grid", "r.yaml:21: fusion.candidates: a grid has its own number of points; leave it out, or take another strategy"),
    "cmaes of one": ("candidates: 8", "members: [general], strategy: cmaes", "r.yaml:21: fusion.strategy: cmaes needs two members at least; with one take gradient or surrogate"),
    "key of a gate": ("candidates: 8", "gate: {activaton: softmax}", "r.yaml:21: fusion.gate.activaton: unknown key 'activaton'; did you mean 'activation'?"),
    "key of a gate outside it": ("candidates: 8", "top_k: 2", "r.yaml:21: fusion.top_k: unknown key 'top_k' here; it belongs under fusion.gate"),
    "gate in words": ("candidates: 8", "gate: a small one", "r.yaml:21: fusion.gate: write true, or a mapping, as in gate: {activation: sigmoid, top_k: 2}"),
    "gate's activation": ("candidates: 8", "gate: {activation: softmx}", "r.yaml:21: fusion.gate.activation: expected one of auto, softmax, sigmoid, linear or a list, got 'softmx'; did you mean 'softmax'?"),
    "gate's activations": ("candidates: 8", "gate: {activation: [sofmax]}", "r.yaml:21: fusion.gate.activation.0: expected one of softmax, sigmoid, linear, got 'sofmax'; did you mean 'softmax'?"),
    "gate's layers": ("candidates: 8", "gate: {layers: [0, -1]}", "r.yaml:21: fusion.gate.layers.1: expected at least 0, got -1"),
    "gate's top k": ("candidates: 8", "gate: {top_k: 4}", "r.yaml:21: fusion.gate.top_k: is 4, and the fusion has 3 members (general, clinic, preference)"),
    "gate, refit": ("candidates: 8", "gate: true, refit: true", "r.yaml:21: fusion.gate: a gate belongs to the adapters that it was fitted to, and refit trains them again; leave one of them out"),
    "gate of one": ("candidates: 8", "gate: true, weights: equal, members: [general]", "r.yaml:21: fusion.gate: a softmax over one adapter (general) is always 1; add members, or set none: true or activation: sigmoid"),
    "gate's none": ("candidates: 8", "gate: {none: true, activation: [softmax, linear]}", "r.yaml:21: fusion.gate.none: is a share of a softmax; linear has coefficients near 0 anyway. Leave one of them out"),
    "gate's temperature": ("candidates: 8", "gate: {temperature: 2, activation: linear}", "r.yaml:21: fusion.gate.temperature: belongs to softmax and sigmoid; linear coefficients are the network's own"),
    "too many gates": ("candidates: 8", "gate: {activation: [softmax, sigmoid], layers: [0, 1, 2, 3, 4, 5, 6]}", "r.yaml:21: fusion.gate: activation × layers are 14 gates to fit; list at most 12"),
    "stage called gate": ("name: preference", "name: gate", "r.yaml:15: stages.2.name: 'gate' is a reserved word; choose another name"),
    "weight of none": ("candidates: 8", "weights: {clinik: 2}", "r.yaml:21: fusion.weights.clinik: 'clinik' is no member of the fusion; did you mean 'clinic'?"),
    "no weight at all": ("candidates: 8", "weights: {general: 0, clinic: 0.0}", "r.yaml:21: fusion.weights: every member has weight 0, which is the base itself; give one of them at least a weight (general, clinic, preference)"),
    "weights of nobody": ("candidates: 8", "weights: {}", "r.yaml:21: fusion.weights: every member has weight 0, which is the base itself; give one of them at least a weight (general, clinic, preference)"),
    "last without its context": ("candidates: 8", "members: [clinic, preference], weights: last", "r.yaml:21: fusion.weights: last is 'preference' as it was trained, beside general, which is no member of the fusion; add to members, or give weights"),
    "last alone": ("candidates: 8", "members: [preference], weights: last", "r.yaml:21: fusion.weights: last is 'preference' as it was trained, beside general, clinic, which are no members of the fusion; add to members, or give weights"),
    "smoothed ipo": ("task: dpo", "task: dpo\n    loss: ipo\n    label_smoothing: 0.1", "r.yaml:18: stages.2.label_smoothing: belongs to loss: sigmoid; ipo has no label smoothing. Leave it out, or use loss: sigmoid"),
    "no modules": (CLINIC, "    lora: {target_modules: []}", "r.yaml:14: stages.1.lora.target_modules: is empty, so there is nothing to train; name modules (q_proj, v_proj …), or write all-linear"),
    "no modules for all": ("lora: {rank: 2,", "lora: {target_modules: [], rank: 2,", "r.yaml:5: lora.target_modules: is empty, so there is nothing to train; name modules (q_proj, v_proj …), or write all-linear"),
    "required, misspelt": ("stages:", "stagse:", "r.yaml:9: stagse: unknown key 'stagse'; did you mean 'stages'?"),
    "required in a stage, misspelt": ("name: clinic", "nmae: clinic", "r.yaml:12: stages.1.nmae: unknown key 'nmae'; did you mean 'name'?"),
    "domain is a stage": ("samples: 2", "domains: {general: x.jsonl}", "r.yaml:22: evaluate.domains.general: 'general' is a stage, which is a domain already"),
    "name": ("name: tiny", "name: Tiny Model", "r.yaml:1: name: 'Tiny Model': a name is lower-case letters, digits, - and _"),
    "number as name": ("name: clinic", "name: 3", "r.yaml:12: stages.1.name: expected a text, got 3; put it in quotes: '3'"),
    "tags": ("base: ./tiny", "base: !!python/object:os.system x", "r.yaml:2: base: a recipe has no YAML tags (!…)"),
    "secret": ("base: ./tiny", "base: ${SECRET}/x", "r.yaml:2: base: ${SECRET} may not be used here: a recipe sees HF_ENDPOINT, HOME, USER and names that begin with LORCHESTRA_"),
    "token": ("base: ./tiny", "base: ${HF_TOKEN}/x", "r.yaml:2: base: ${HF_TOKEN} may not be used here: a recipe sees HF_ENDPOINT, HOME, USER and names that begin with LORCHESTRA_"),
    "secret in data": ("data: clinic.jsonl", "data: {source: '${HF_ENDPONT}/x'}", "r.yaml:13: stages.1.data: ${HF_ENDPONT} may not be used here: a recipe sees HF_ENDPOINT, HOME, USER and names that begin with LORCHESTRA_; did you mean 'HF_ENDPOINT'?"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake, load, tmp_path):
    old, new, message = MISTAKES[mistake]
    assert GOOD.count(old) == 1
    assert refusal(load, tmp_path, GOOD.replace(old, new)) == message


def test_every_mistake_is_told_at_once_up_to_eight(load, tmp_path):
    message = refusal(load, tmp_path, GOOD.replace("max_length: 96", "max_lenght: 96\ndtype: bf16"))
    assert message.splitlines() == [
        "r.yaml:4: dtype: expected one of auto, float32, bfloat16, float16, nf4, got 'bf16'; did you mean 'bfloat16'?",
        "r.yaml:3: max_lenght: unknown key 'max_lenght'; did you mean 'max_length'?",
    ]
    many = GOOD.replace("max_length: 96", "\n".join(f"key{i}: 1" for i in range(12)))
    lines = refusal(load, tmp_path, many).splitlines()
    assert len(lines) == 9
    assert lines[-1] == "… and 4 more"


def test_domains_need_a_sealed_test(load, tmp_path):
    text = GOOD.replace("train: 0.6", "train: 0.8").replace("test: 0.2", "test: 0")
    message = refusal(load, tmp_path, text.replace("samples: 2", "domains: {law: law.jsonl}"))
    assert message == (
        "r.yaml:4: split.test: is 0, so evaluate.domains would never be scored; give it a share, or leave them out"
    )
    assert load(text)


def test_last_needs_no_context_that_has_faded_to_nothing(load):
    faded = GOOD.replace("to: 0.5", "to: 0.0")
    assert load(faded.replace("candidates: 8", "members: [clinic, preference], weights: last"))


def test_the_goal_of_a_fusion(load):
    from lorchestra.evaluate.goal import Goal
    from lorchestra.fusion.search import STRATEGIES

    assert load().fusion.aim() == Goal()
    worst = load(GOOD.replace("candidates: 8", "goal: worst, tolerance: 0.02"))
    assert worst.fusion.aim() == Goal("worst", tolerance=0.02)
    weighted = load(GOOD.replace("candidates: 8", "goal: {general: 2, clinic: 1}"))
    assert weighted.fusion.aim() == Goal("weighted", {"general": 2, "clinic": 1})
    for strategy in STRATEGIES:
        assert load(GOOD.replace("candidates: 8", f"strategy: {strategy}")).fusion.strategy == strategy


def test_a_gate_has_short_forms_and_is_off_by_default(load):
    assert load().fusion.gate is None
    assert load(GOOD.replace("candidates: 8", "gate: false")).fusion.gate is None
    short = load(GOOD.replace("candidates: 8", "gate: true"))
    assert short.fusion.gate == load(GOOD.replace("candidates: 8", "gate: {}")).fusion.gate == Gate()
    assert load(GOOD, "fusion.gate.top_k=2").fusion.gate == Gate(top_k=2)
    emptied = load(GOOD.replace("candidates: 8", "gate: {examples: null, hidden: null}"))
    assert emptied.fusion.gate == Gate(examples=None)


def test_a_gate_needs_a_part_to_be_chosen_on_and_one_to_win_on(load, tmp_path):
    gated = GOOD.replace("candidates: 8", "gate: true, weights: equal")
    split = "train: 0.6, validation: 0.2, test: 0.2"
    without = refusal(load, tmp_path, gated.replace(split, "train: 0.8, validation: 0.2, test: 0"))
    assert without.startswith("r.yaml:21: fusion.gate: a gate is delivered only if it beats the static weights")
    without = refusal(load, tmp_path, gated.replace(split, "train: 0.8, validation: 0, test: 0.2"))
    assert without.startswith("r.yaml:21: fusion.gate: a gate is chosen on λ-validation, and split.validation is 0")


def test_the_gates_of_a_recipe_are_every_combination_of_what_it_lists(load):
    """Adapters that were trained beside one another are wanted together, which a softmax cannot say."""
    assert [gate.activation for gate in candidates(load(GOOD.replace("candidates: 8", "gate: true")))] == ["sigmoid"]
    apart = "name: x\nbase: b\nstages: [{name: a, data: a.jsonl}, {name: b, data: b.jsonl}]\nfusion: {gate: true}\n"
    assert [gate.activation for gate in candidates(load(apart))] == ["softmax"]
    both = candidates(load(GOOD.replace("candidates: 8", "gate: {activation: [softmax, linear], layers: [0, 2, 0]}")))
    told = [(gate.activation, gate.layers, gate.hidden) for gate in both]
    assert told == [("softmax", 0, 0), ("softmax", 2, 0), ("linear", 0, 0), ("linear", 2, 0)]
    assert candidates(load()) == []
    assert suggest_activation(load(GOOD.replace("candidates: 8", "gate: {none: true}")))[0] == "softmax"


def test_names_are_used_once_and_reserved_words_never(load, tmp_path):
    assert "r.yaml:12: stages.1.name: the name 'general' is used twice" in refusal(
        load, tmp_path, GOOD.replace("name: clinic", "name: general")
    )
    for word in ("base", "auto", "uniform", "stack", "mixed", "delivered"):
        message = refusal(load, tmp_path, GOOD.replace("name: clinic", f"name: {word}"))
        assert f"stages.1.name: {word!r} is a reserved word" in message


def test_short_forms_mean_the_long_ones(load):
    short = GOOD.replace(CLINIC, "    context: general\n    epochs: 3\n    learning_rate: 1e-3")
    long = GOOD.replace(
        CLINIC, "    context: {general: {weight: 1.0}}\n    train: {epochs: 3, learning_rate: 0.001}"
    ).replace("data: clinic.jsonl", "data: [{source: clinic.jsonl}]")
    assert load(short).model_dump() == load(long).model_dump()
    assert load(GOOD.replace(CLINIC, "    context: [general]")).model_dump() == load().model_dump()
    assert load(GOOD.replace(CLINIC, "    context:\n      general:")).model_dump() == load().model_dump()


def test_a_section_with_nothing_in_it_is_its_defaults(load):
    emptied = re.sub(r"^(fusion|evaluate):.*$", r"\1:  # all commented out", GOOD, flags=re.MULTILINE)
    defaults = re.sub(r"^(fusion|evaluate):.*\n", "", GOOD, flags=re.MULTILINE)
    assert load(emptied).model_dump() == load(defaults).model_dump()
    assert load(GOOD.replace(CLINIC, "    context:\n    lora:\n    train:")).stages[1].context == {}


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("stages.0.epochs=1", lambda r: r.train_of(r.stages[0]).epochs, 1),
        ("stages.general.epochs=1.5", lambda r: r.train_of(r.stages[0]).epochs, 1.5),
        ("stages.0.train.epochs=3", lambda r: r.train_of(r.stages[0]).epochs, 3),
        ("stages.clinic.lora.rank=4", lambda r: r.lora_of(r.stages[1]).rank, 4),
        ("stages.clinic.learning_rate=1e-3", lambda r: r.train_of(r.stages[1]).learning_rate, 1e-3),
        ("stages.clinic.context.general=0.25", lambda r: r.stages[1].context["general"].weight, 0.25),
        ("stages.2.context.general.to=0", lambda r: r.stages[2].context["general"].to, 0),
        ("stages.1.data=other.csv", lambda r: r.stages[1].data[0].source, "other.csv"),
        ("seeds.data=3", lambda r: r.seeds.data, 3),
        ("fusion.weights={general: 0.5}", lambda r: r.fusion.weights, {"general": 0.5}),
        ("fusion.weights=equal", lambda r: r.fusion.weights, "equal"),
        ("evaluate.test_limit=null", lambda r: r.evaluate.test_limit, None),
        ("evaluate.test_limit=", lambda r: r.evaluate.test_limit, None),
        ("adapters.old=foo/bar", lambda r: r.adapters, {"old": "foo/bar"}),
        ("train.report_to=[tensorboard]", lambda r: r.train.report_to, ("tensorboard",)),
    ],
)
def test_overrides_reach_their_key(override, read, value, load):
    assert read(load(GOOD, override)) == value


@pytest.mark.parametrize(
    "written", ["    epochs: 7", "    train: {epochs: 7}", "    max_steps: 7", "    train: {max_steps: 7}"]
)
@pytest.mark.parametrize("override", ["stages.clinic.epochs=2", "stages.1.train.epochs=2"])
def test_an_override_wins_over_either_spelling_and_over_max_steps(written, override, load):
    recipe = load(GOOD.replace(CLINIC, written), override)
    train = recipe.train_of(recipe.stages[1])
    assert (train.epochs, train.max_steps) == (2, None)


def test_an_override_of_the_default_epochs_undoes_max_steps(load):
    recipe = load(GOOD, "train.epochs=2")
    assert (recipe.train.epochs, recipe.train.max_steps) == (2, None)
    recipe = load(GOOD.replace("max_steps: 6", "epochs: 6"), "train.max_steps=2")
    assert recipe.train.max_steps == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.epoch=1", "stages.0.epoch: unknown key 'epoch'; did you mean 'epochs'?"),
        ("stage.0.epochs=1", "stage: unknown key 'stage'; did you mean 'stages'?"),
        ("epochs=1", "epochs: unknown key 'epochs' here; it belongs under train"),
        ("train.epochs=abc", "train.epochs: expected a number, got 'abc'"),
        ("lora.rank=4.5", "lora.rank: expected a whole number, got 4.5"),
        ("stages.clinic.context.foo=1", "stages.1.context.foo: context 'foo' names no earlier stage or adapter"),
        ("stages.7.epochs=1", "there is no '7' in the list; there are general, clinic, preference"),
        ("stages.clinc.epochs=1", "there is no 'clinc' in the list; there are general, clinic, preference; did you mean 'clinic'?"),
        ("stages.-1.epochs=1", "there is no '-1' in the list; there are general, clinic, preference"),
        ("base.x=3", "base is './tiny' in the recipe; nothing can be set inside it. Set the whole: --set base=…"),
        ("stages.clinic.data.limit=5", "stages.1.data is 'clinic.jsonl' in the recipe; nothing can be set inside it. Set the whole: --set stages.1.data=…"),
        ("train.epochs", "write key.path=value, for example --set stages.0.epochs=1"),
        ("=3", "write key.path=value, for example --set stages.0.epochs=1"),
        ("train..epochs=3", "write key.path=value, for example --set stages.0.epochs=1"),
        ("fusion.weights={general: 1", "the value is not YAML: the { that opens here is not closed, or a comma is missing. A value with brackets or spaces stands in quotes for the shell: --set 'fusion.weights={a: 1}'"),
    ],
)  # fmt: skip
def test_a_bad_override_is_named_as_it_was_given(override, message, load, tmp_path):
    assert refusal(load, tmp_path, GOOD, override) == f"--set {override}: {message}"


def test_what_stood_in_the_file_under_an_overridden_key_is_no_place_any_more(load, tmp_path):
    message = refusal(load, tmp_path, GOOD, "stages.2.context={general: {weight: much}}")
    assert message == (
        "--set stages.2.context={general: {weight: much}}: stages.2.context.general.weight: expected a number, got 'much'"
    )


def test_variables_are_kept_unexpanded_and_filled_in_where_they_are_used(load, monkeypatch):
    monkeypatch.setenv("LORCHESTRA_DATA", "/somewhere/else")
    recipe = load(GOOD.replace("data: clinic.jsonl", "data: ${LORCHESTRA_DATA}/clinic.jsonl"))
    assert "${LORCHESTRA_DATA}/clinic.jsonl" in recipe.text
    assert recipe.stages[1].data[0].source == "${LORCHESTRA_DATA}/clinic.jsonl"
    assert "/somewhere/else" not in recipe.model_dump_json()
    assert recipe.stages[1].data[0].spec().source == "/somewhere/else/clinic.jsonl"


@pytest.fixture
def files(tmp_path):
    """The files that the good recipe names."""
    (tmp_path / "tiny").mkdir()
    for name in ("general", "clinic", "pairs"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base: ./tiny", "base: ./tinny", "r.yaml:2: base: source './tinny': there is no tinny; did you mean 'tiny'?"),
        ("data: clinic.jsonl", "data: clinc.jsonl", "r.yaml:13: stages.1.data: source 'clinc.jsonl': there is no clinc.jsonl; did you mean 'clinic.jsonl'?"),
        # A relative path to a file is not taken for a hub name.
        ("data: clinic.jsonl", "data: data/clinic.jsonl", "r.yaml:13: stages.1.data: source 'data/clinic.jsonl': there is no data/clinic.jsonl"),
        ("data: clinic.jsonl", "data: s3://x/clinic.jsonl", "r.yaml:13: stages.1.data: source 's3://x/clinic.jsonl': unknown kind; use a path, hf:org/name or pip:distribution==version/path"),
        ("data: clinic.jsonl", "data: {source: clinic.jsonl, format: alpacca}", "r.yaml:13: stages.1.data: unknown data format 'alpacca'; expected auto, preference, messages, sharegpt, choice, alpaca, prompt_completion. Did you mean 'alpaca'?"),
        ("data: clinic.jsonl", "data: {source: clinic.jsonl, fields: {promt: a, completion: b}}", "r.yaml:13: stages.1.data: fields: unknown part 'promt'; expected system, messages, prompt, completion, chosen, rejected, choices, group. Did you mean 'prompt'?"),
        ("samples: 2", "domains: {law: clinc.jsonl}", "r.yaml:22: evaluate.domains.law: source 'clinc.jsonl': there is no clinc.jsonl; did you mean 'clinic.jsonl'?"),
        ("base: ./tiny", "base: smollm", "r.yaml:2: base: source 'smollm': there is no smollm. A model or data set of the hub is written hf:org/smollm, a file in a Python package pip:distribution==version/path/inside"),
        ("base: ./tiny", "base: ${LORCHESTRA_NOT_SET}/x", "r.yaml:2: base: the environment variable LORCHESTRA_NOT_SET is not set, which '${LORCHESTRA_NOT_SET}/x' needs"),
    ],
)  # fmt: skip
def test_sources_are_looked_at_before_anything_is_fetched(old, new, message, load, tmp_path, files):
    # What would have to be fetched comes first: it must not be tried.
    recipe = load(GOOD.replace(old, new).replace("data: general.jsonl", "data: hf:nobody/nothing"))
    with pytest.raises(RecipeError) as error:
        recipe.check_sources()
    assert str(error.value).replace(f"{tmp_path}/", "") == message


def test_good_sources_pass(load, files):
    load().check_sources()
    load(GOOD.replace("base: ./tiny", "base: org/model")).check_sources()


def test_from_dict_gives_the_same_recipe_and_the_same_messages(load, tmp_path):
    recipe = load()
    again = Recipe.from_dict(recipe.model_dump(mode="json"), tmp_path)
    assert again.model_dump() == recipe.model_dump()
    assert again.directory == tmp_path
    with pytest.raises(RecipeError, match=r"^recipe: lora\.rnk: unknown key 'rnk'; did you mean 'rank'\?$"):
        Recipe.from_dict({**recipe.model_dump(mode="json"), "lora": {"rnk": 3}})


def test_a_recipe_survives_its_own_json(load):
    recipe = load()
    assert Recipe.model_validate_json(recipe.model_dump_json()).model_dump() == recipe.model_dump()
