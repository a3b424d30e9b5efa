"""Stages on the tiny model: the frozen stays frozen, PEFT agrees, the preference law holds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.conftest import make_tiny_model
from tests.train.conftest import BASE, KillAfter, KilledError, adapter_for, inputs, pairs, run, sft_items

from lorchestra.bank import Bank
from lorchestra.errors import PausedError, TrainingError, UserError
from lorchestra.events import Silent
from lorchestra.objective.batch import pack
from lorchestra.objective.logprobs import branch_logprobs
from lorchestra.train import stage as stage_module
from lorchestra.train.lora import new_member
from lorchestra.train.settings import ContextMember, LoraSettings, Objective, Orthogonality, TrainSettings
from lorchestra.train.stage import frozen_digest


def test_sft_learns_and_leaves_the_base_alone(tiny_model, tmp_path):
    before = frozen_digest(tiny_model)
    result = run(tiny_model, tmp_path, inputs(train=TrainSettings(epochs=8, batch_size=4, learning_rate=1e-2)))
    validation = [row["loss"] for row in result.progress.validation]
    assert min(validation) < 0.8 * validation[0]
    assert frozen_digest(tiny_model) == before
    assert result.steps == 8 * result.steps_per_epoch == 8 * 6
    best = min(result.progress.validation[1:], key=lambda row: row["loss"])
    assert result.progress.best_step == best["step"]
    bank = Bank(tiny_model, BASE)
    bank.load("new", result.adapter)
    packed = pack(sft_items(6, seed=1), 3)
    with bank.using({"new": 1.0}), torch.no_grad():
        loss = -float(branch_logprobs(tiny_model, packed).sums.sum()) / packed.supervised
    assert loss == pytest.approx(best["loss"], rel=1e-5), "the delivered adapter is the best validated one"


def test_same_seeds_same_bits_and_other_seeds_other_bits(tmp_path):
    digests = {
        key: run(make_tiny_model(), tmp_path, inputs(init_seed=init, data_seed=data), name=key).adapter.digest
        for key, init, data in [("a", 0, 0), ("b", 0, 0), ("c", 1, 0), ("d", 0, 1)]
    }
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 3


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", math.log(2)), ("ipo", 1 / (4 * 0.2**2))])
def test_preference_law_and_learning(tiny_model, tmp_path, loss, expected):
    context = {"old": (adapter_for(tiny_model, 1), ContextMember(weight=0.5))}
    given = inputs(
        objective=Objective(task="dpo", loss=loss, beta=0.2),
        items=pairs(22),
        validation=pairs(6, seed=1),
        context=context,
        train=TrainSettings(epochs=6, batch_size=4, learning_rate=5e-3),
    )
    result = run(tiny_model, tmp_path, given)
    assert result.first_preference_loss == pytest.approx(expected, rel=1e-6)
    assert result.progress.validation[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert result.progress.best_loss < 0.8 * expected
    assert result.progress.history[-1]["accuracy"] > 0.9
    assert [(p.name, p.coefficient) for p in result.adapter.lineage.context] == [("old", 0.5)]


def test_preference_reference_that_is_not_this_models_is_refused(tiny_model, tmp_path):
    given = inputs(objective=Objective(task="dpo"), items=pairs(8), validation=[])
    with pytest.raises(KilledError):
        run(tiny_model, tmp_path, given, reporter=KillAfter(1))
    tiny_model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(TrainingError, match="Policy and reference differ"):
        run(tiny_model, tmp_path, given)


def test_context_that_does_nothing_is_refused_for_preference(tiny_model, tmp_path):
    nothing = adapter_for(tiny_model, 1) * 0.0
    given = inputs(
        objective=Objective(task="dpo"), items=pairs(8), validation=[], context={"old": (nothing, ContextMember())}
    )
    with pytest.raises(TrainingError, match="equals the bare base"):
        run(tiny_model, tmp_path, given)


def test_a_changed_base_is_noticed(tiny_model, tmp_path, monkeypatch):
    class Meddler(Silent):
        def event(self, kind, /, **fields):
            if kind == "train_step":
                tiny_model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1

    with pytest.raises(TrainingError, match="changed a tensor of the frozen base"):
        run(tiny_model, tmp_path, inputs(), reporter=Meddler())
    assert not (tmp_path / "work").exists(), "the next run goes on from no checkpoint of this one"


def test_a_changed_context_is_noticed(tiny_model, tmp_path):
    old = adapter_for(tiny_model, 1, scale=0.3)

    class Meddler(Silent):
        def event(self, kind, /, **fields):
            if kind == "train_step":
                next(iter(old.modules.values())).B.data[0, 0] += 1e-3

    with pytest.raises(TrainingError, match="changed its frozen context"):
        run(tiny_model, tmp_path, inputs(context={"old": (old, ContextMember())}), reporter=Meddler())


def test_a_changed_mounted_copy_is_noticed(tmp_path):
    """In bfloat16 what is mounted is a copy: the adapter itself stays as it was."""
    model = make_tiny_model().to(torch.bfloat16)
    old = adapter_for(model, 1, scale=0.3)
    digest = old.digest

    class Meddler(Silent):
        def event(self, kind, /, **fields):
            if kind == "train_step":
                (layer,) = model.model.layers[0].mlp.up_proj._forward_hooks.values()
                layer.frozen["old"].B.data[0, 0] += 1

    with pytest.raises(TrainingError, match="changed its frozen context"):
        run(model, tmp_path, inputs(context={"old": (old, ContextMember())}), reporter=Meddler())
    assert old.digest == digest


def test_a_buffer_that_is_not_saved_belongs_to_the_frozen_base(tiny_model):
    before = frozen_digest(tiny_model)
    assert not any("inv_freq" in key for key in tiny_model.state_dict())
    tiny_model.model.rotary_emb.inv_freq[0] += 1e-3
    assert frozen_digest(tiny_model) != before


def test_stages_in_one_process_may_differ_in_dtype(tmp_path):
    """accelerate refuses a float16 stage after one of another kind, unless its process-wide state is new."""
    first = {}
    for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float16):
        result = run(make_tiny_model().to(kind), tmp_path, inputs(), name=f"{len(first)}-{kind}")
        first[kind] = result.progress.history[0]
    for kind in (torch.float16, torch.bfloat16):
        assert first[kind]["loss"] == pytest.approx(first[torch.float32]["loss"], rel=2e-2), kind
        assert first[kind]["gradient_norm"] == pytest.approx(first[torch.float32]["gradient_norm"], rel=5e-2), kind


def overlap(one, two):
    """Largest share, over modules, of the energy of ``two``'s A inside the row space of ``one``'s; in float64."""
    shares = []
    for path, A in two.items():
        _, _, V = torch.linalg.svd(one[path].double(), full_matrices=False)
        shares.append(float((A.double() @ V.T).square().sum() / A.double().square().sum()))
    return max(shares)


def rows(adapter):
    return {path: update.A for path, update in adapter.modules.items()}


def test_a_later_stage_starts_outside_an_earlier_one(tiny_model, tmp_path):
    """Stages of one recipe share rank and seed, not their start; under projection A leaves the context's rows."""
    plain = inputs().lora
    starts = {}
    for name in ("first", "second"):
        member = new_member(tiny_model, plain, seed=0, name=name)
        starts[name] = {path: A.detach() for path, A in zip(member.paths, member.A, strict=True)}
    assert overlap(starts["first"], starts["first"]) == pytest.approx(1)
    assert overlap(starts["first"], starts["second"]) < 0.5

    first = run(tiny_model, tmp_path, replace(inputs(), name="first"), name="first").adapter
    away = plain.model_copy(update={"orthogonality": Orthogonality(mode="projection", against_context=True)})
    context = {"first": (first, ContextMember())}
    shares = {}
    for rate in (1e-12, 1e-2):
        for key, lora in {"free": plain, "away": away}.items():
            train = TrainSettings(epochs=2, batch_size=4, learning_rate=rate)
            given = replace(inputs(context=context, train=train), name="second", lora=lora)
            second = run(tiny_model, tmp_path, given, name=f"{key}-{rate}").adapter
            shares[key, rate] = overlap(rows(first), rows(second))
    assert shares["away", 1e-12] < 1e-10, "where training starts: outside, up to rounding"
    assert shares["away", 1e-2] < 0.1 * shares["free", 1e-2], "Adam's rescaling lets a little back in"


def test_context_matters_and_fades(tiny_model, tmp_path):
    old = adapter_for(tiny_model, 1, scale=0.3)
    results = {}
    for key, member in {
        "constant": ContextMember(weight=1.0),
        "faded": ContextMember(weight=1.0, schedule="linear", to=0.25, start=0.0, end=0.5),
    }.items():
        results[key] = run(tiny_model, tmp_path, inputs(context={"old": (old, member)}), name=key)
    alone = run(tiny_model, tmp_path, inputs(), name="alone")
    assert len({r.adapter.digest for r in [*results.values(), alone]}) == 3
    assert results["faded"].adapter.lineage.context[0].coefficient == 0.25
    assert results["faded"].progress.history[0]["context"] == {"old": 1.0}
    assert results["faded"].progress.history[-1]["context"] == {"old": 0.25}


@pytest.mark.parametrize("rslora", [True, False])
def test_one_step_equals_peft(tiny_model, tmp_path, rslora):
    """Training through the bank is training through PEFT: one AdamW step, float32."""
    import peft

    items = sft_items(6)
    lora = LoraSettings(rank=4, alpha=6, scaling="rslora" if rslora else "lora")
    train = TrainSettings(
        max_steps=1, batch_size=6, learning_rate=1e-2, warmup_ratio=0, scheduler="constant", max_grad_norm=0
    )
    ours = run(tiny_model, tmp_path, inputs(lora=lora, train=train, items=items, validation=[])).adapter

    reference = make_tiny_model()
    start = new_member(reference, lora, seed=0, name="new")
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(reference, config)
    with torch.no_grad():
        for path, A in zip(start.paths, start.A, strict=True):
            model.get_submodule(f"base_model.model.{path}.lora_A.default").weight.copy_(A)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)
    total, tokens = 0.0, 0
    for item in items:
        ids = torch.tensor([item.prompt + item.branches[0].ids])
        labels = ids.clone()
        labels[:, : len(item.prompt)] = -100
        n = len(item.branches[0].ids)
        total, tokens = total + model(input_ids=ids, labels=labels).loss * n, tokens + n
    (total / tokens).backward()
    optimizer.step()
    for path, update in ours.modules.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        dense = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(update.dense(), dense, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("mode", ["penalty", "projection"])
def test_orthogonality_lowers_what_it_measures(tiny_model, tmp_path, mode):
    context = {"old": (adapter_for(tiny_model, 1), ContextMember())}
    last = {}
    for key, chosen in {"off": "penalty", "on": mode}.items():
        orthogonality = Orthogonality(mode=chosen, weight=0.0 if key == "off" else 50.0, against_context=True)
        given = inputs(lora=LoraSettings(rank=4, alpha=4, orthogonality=orthogonality), context=context)
        last[key] = run(tiny_model, tmp_path, given, name=key).progress.history[-1]["orthogonality"]
    assert last["on"] < last["off"]


class TestBadInput:
    def test_no_items(self, tiny_model, tmp_path):
        with pytest.raises(UserError, match="no training items"):
            run(tiny_model, tmp_path, inputs(items=[]))

    def test_divergence(self, tiny_model, tmp_path):
        bad = adapter_for(tiny_model, 1, scale=1e19)
        with pytest.raises(TrainingError, match="lower learning_rate"):
            run(tiny_model, tmp_path, inputs(context={"old": (bad, ContextMember())}, validation=[]))

    def test_unknown_module(self, tiny_model, tmp_path):
        with pytest.raises(UserError, match="did you mean 'q_proj'"):
            run(tiny_model, tmp_path, inputs(lora=LoraSettings(target_modules=("q_prj",))))
        assert stage_module.frozen_digest(tiny_model), "the model can still be used"

    def test_a_tracker_that_is_not_installed(self, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setattr("accelerate.tracking._available_trackers", [])
        train = TrainSettings(max_steps=2, batch_size=4, report_to=("tensorboard",))
        with pytest.raises(UserError, match="tensorboard is not installed here; `pip install tensorboard`"):
            run(tiny_model, tmp_path, inputs(train=train))


class TestPause:
    def test_a_pause_is_at_a_validation_and_training_goes_on_as_if_there_had_been_none(self, tiny_model, tmp_path):
        given = inputs()
        whole = run(tiny_model, tmp_path, given, "whole")
        with pytest.raises(PausedError) as paused:
            run(tiny_model, tmp_path, given, "parts", pause=0.3)
        assert (paused.value.step, paused.value.steps) == (6, 12)  # an epoch is six steps, and validated after
        assert paused.value.loss == whole.progress.validation[1]["loss"]
        with pytest.raises(PausedError):  # where it stands already
            run(tiny_model, tmp_path, given, "parts", pause=0.3)
        result = run(tiny_model, tmp_path, given, "parts", pause=1.0)
        assert result.adapter.digest == whole.adapter.digest
        assert result.progress.validation == whole.progress.validation

    def test_a_pause_that_is_never_due(self, tiny_model, tmp_path):
        result = run(tiny_model, tmp_path, inputs(validation=()), pause=0.5)
        assert result.progress.step == 12
