"""What the training benchmark counts is what is trained: tokens, supervision, products, losses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lorchestra.data.example import Example, Message
from lorchestra.data.render import Renderer
from lorchestra.objective.batch import pack


@pytest.fixture(scope="module")
def parts(script):
    return script("train_parts")


@pytest.fixture(scope="module")
def train(script):
    return script("train")


@pytest.fixture(scope="module")
def peer(script):
    return script("peers/with_trl")


def turns(*texts):
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


@pytest.fixture(scope="module")
def answers(tiny_tokenizer):
    """Of different lengths; one has two assistant turns, so that its branch is not supervised throughout."""
    renderer = Renderer(tiny_tokenizer, 200)
    talks = [turns("2 + 2 = ?", "4"), turns("hello", "hi there", "and you?", "well"), turns("a longer question", "no")]
    rendered = [renderer.sft(Example(talk)) for talk in talks]
    assert not all(rendered[1].branches[0].supervised)
    return rendered


@pytest.fixture(scope="module")
def pairs(tiny_tokenizer):
    renderer = Renderer(tiny_tokenizer, 200)
    return [
        renderer.preference(Example(turns("2 + 2 = ?", "4"), rejected="five, I think")),
        renderer.preference(Example(turns("which is larger, 7 or 9?", "nine is"), rejected="7")),
    ]


def job(parts, task, items, **more):
    settings = {"batch_size": 2, "gradient_accumulation": 1, "epochs": 1.0, "max_steps": None}
    written = [parts.as_json(item) for item in items]
    found = {"task": task, "items": written, "validation": [], "train": settings, "lora": {"rank": 2}}
    return json.loads(json.dumps(found | more))


@pytest.mark.parametrize("kind", ["answers", "pairs"])
def test_a_job_holds_what_was_rendered(kind, parts, request):
    items = request.getfixturevalue(kind)
    assert [parts.as_rendered(item) for item in job(parts, "sft", items)["items"]] == items


@pytest.mark.parametrize(("task", "kind"), [("sft", "answers"), ("dpo", "pairs")])
def test_tokens_are_those_of_the_training_loop(task, kind, parts, train, request):
    items = request.getfixturevalue(kind)
    counted = train.counted(job(parts, task, items))
    batch = pack(items, 0)
    assert counted["tokens"] == batch.tokens
    assert counted["supervised"] == batch.supervised == sum(item.supervised for item in items)
    assert parts.rows_of_a_batch(job(parts, task, items)) == round(2 * batch.tokens / len(items))


def test_trl_is_given_the_tokens_and_the_mask_that_we_train_on(parts, peer, answers):
    rows = peer.sft_rows(job(parts, "sft", answers)["items"])
    batch = pack(answers, 0)
    ours = set(zip(batch.row.tolist(), (batch.column + 1).tolist(), batch.target.tolist(), strict=True))
    theirs = {
        (i, j, token)
        for i, row in enumerate(rows)
        for j, (token, counts) in enumerate(zip(row["input_ids"], row["completion_mask"], strict=True))
        if counts
    }
    assert theirs == ours
    for i, row in enumerate(rows):
        assert row["length"] == len(row["input_ids"]) == answers[i].length
        assert row["input_ids"] == batch.input_ids[i, : row["length"]].tolist()


def test_trl_is_given_the_pairs_that_we_train_on(parts, peer, pairs):
    for row, item in zip(peer.dpo_rows(job(parts, "dpo", pairs)["items"]), pairs, strict=True):
        assert tuple(row["prompt_ids"]) == item.prompt
        assert (tuple(row["chosen_ids"]), tuple(row["rejected_ids"])) == tuple(branch.ids for branch in item.branches)
        assert row["length"] == item.length


def test_a_pair_that_trl_would_supervise_otherwise_is_refused(parts, peer, answers):
    with pytest.raises(ValueError, match="supervises whole answers"):
        peer.dpo_rows(job(parts, "dpo", answers)["items"])


@pytest.mark.parametrize(("items", "batch", "accumulation", "steps"), [(16, 8, 1, 2), (17, 8, 1, 3), (17, 8, 2, 2)])
def test_steps_of_an_epoch_are_those_of_the_batch_plan(peer, items, batch, accumulation, steps):
    from lorchestra.train.schedule import BatchPlan
    from lorchestra.train.settings import TrainSettings

    settings = TrainSettings(batch_size=batch, gradient_accumulation=accumulation)
    found = {"items": [None] * items, "train": settings.model_dump(mode="json")}
    assert peer.steps_of_an_epoch(found) == BatchPlan([1] * items, settings, 0, fixed=False).steps_per_epoch == steps


def test_the_bound_counts_the_products_that_a_trained_lora_needs(train):
    """Against torch's own counter, on two linear modules with PEFT's LoRA."""
    import peft
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    rank, tokens, shapes = 2, 7, [(20, 12), (8, 20)]
    inner = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes))
    model = peft.get_peft_model(inner, peft.LoraConfig(r=rank, target_modules=["0", "1"]))
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.randn(tokens, 12, requires_grad=True)).sum().backward()
    bound = {
        "parameters": sum(m * n for m, n in shapes),
        "lora_parameters": sum(rank * (m + n) for m, n in shapes),
    }
    assert train.bound_tokens_per_second("sft", tokens, 1.0, bound, 1e6) == pytest.approx(
        tokens * 1e6 / counter.get_total_flops()
    )
    # The reference: two more a token and weight, once, however many epochs there are.
    with_reference = counter.get_total_flops() * 3 + tokens * 2 * bound["parameters"]
    assert train.bound_tokens_per_second("dpo", tokens, 3.0, bound, 1e6) == pytest.approx(
        3 * tokens * 1e6 / with_reference
    )


def a_run(seconds, steps=2, loss=1.0, peak=100.0, seed=0):
    return {
        "seconds": seconds, "processor_seconds": 2 * seconds, "steps": steps, "peak_mb": peak, "seed": seed,
        "first_loss": 0.7,
        "scored": {"train": loss, "validation": loss + 1},
    }  # fmt: skip


def rows_of(theirs, ours):
    return {
        "task": "sft", "items": 16, "batch_size": 8, "tokens": 1000, "supervised": 90,
        "lora": {"rank": 8, "scaling": "rslora"}, "train": {"learning_rate": 1e-3},
        "bound": [
            {"parameters": 10, "lora_parameters": 0, "flop": 40 * 1000, "seconds": 1.0, "processor_seconds": 1.6}
        ] * len(ours),
        "sides": {"TRL": theirs, "lorchestra": ours},
    }  # fmt: skip


def test_ratios_are_taken_within_a_round(train):
    """A machine that is twice as slow in one round is so for both sides."""
    rows = rows_of([a_run(10), a_run(20, seed=1)], [a_run(4, loss=1.0, peak=90), a_run(8, loss=1.5, seed=1)])
    rows["sides"]["ms-swift"] = [a_run(15, seed=1)]
    found = train.summary(rows, "wall", 2)
    assert found["bound"]["tokens_per_second"] == pytest.approx(1000)
    assert found["lorchestra"]["times_trl"] == pytest.approx(2.5)
    assert found["TRL"]["times_trl"] == 1
    assert found["ms-swift"]["times_trl"] == pytest.approx(20 / 15)
    assert found["lorchestra"]["tokens_per_second"] == pytest.approx((250 + 125) / 2)
    assert found["lorchestra"]["of_the_bound"] == pytest.approx((0.25 + 0.125) / 2)
    assert found["lorchestra"]["train"] == {"mean": 1.25, "spread": 0.5}
    assert found["lorchestra"]["peak_mb"] == 100
    by_processor = train.summary(rows, "processor", 1)
    assert by_processor["lorchestra"]["of_the_bound"] == pytest.approx(1.6 * (0.125 + 0.0625) / 2)
    assert by_processor["lorchestra"]["times_trl"] == pytest.approx(2.5)
    shown = train.table({"tasks": {"sft": rows | {"summary": found}}, "rounds": 2, "threads": 2, "clock": "wall"})
    assert "| sft | lorchestra | 188 | 2.50 | 0.19 | 1.2500 ± 0.2500 | 2.2500 ± 0.2500 | 100 MB | 6.0 s |" in shown


def test_sides_that_made_different_numbers_of_steps_are_not_compared(train):
    with pytest.raises(SystemExit, match="different numbers of steps"):
        train.summary(rows_of([a_run(10, steps=3)], [a_run(4)]), "wall", 2)


def test_the_scorer_agrees_with_the_losses_that_are_trained(script, parts, tiny_model, answers, pairs):
    """The judge shares no code with us: batches, masks and trees against one item at a time."""
    from lorchestra.objective.logprobs import branch_logprobs
    from lorchestra.objective.losses import preference_terms, sft_loss

    scorer = script("peers/scorer")
    with torch.no_grad():
        batch = pack(answers, 0)
        expected = float(sft_loss(branch_logprobs(tiny_model, batch), batch.supervised))
        items = job(parts, "sft", answers)["items"]
        assert scorer.sft_loss(tiny_model, items) == pytest.approx(expected, rel=1e-5)

        policy = branch_logprobs(tiny_model, pack(pairs, 0))
        reference = policy.sums + torch.tensor([0.5, -1.0, 2.0, 0.0])
        wanted = float(preference_terms(policy, reference, loss="sigmoid", beta=0.3).loss.mean())
        items = job(parts, "dpo", pairs)["items"]
        bare = reference.reshape(-1, 2).tolist()
        assert scorer.dpo_loss(tiny_model, items, bare, 0.3) == pytest.approx(wanted, rel=1e-5)
        itself = [scorer.sums(tiny_model, item) for item in items]
        assert scorer.dpo_loss(tiny_model, items, itself, 0.3) == pytest.approx(math.log(2), rel=1e-9)
