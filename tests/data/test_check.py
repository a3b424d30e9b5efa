"""The preflight: what it counts, what it warns of, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lorchestra.data.check import StageData, check_data
from lorchestra.data.example import Example, Message
from lorchestra.data.load import Loaded
from lorchestra.data.near import near_pairs, shingles, similarity, without_boilerplate
from lorchestra.data.render import Branch, Renderer
from lorchestra.data.split import Splits, SplitSpec
from lorchestra.errors import DataError

WORDS = ["fever", "cough", "sepsis", "lung", "heart", "kidney", "blood", "acute"]
WORDS += ["renal", "failure", "chest", "pain", "nurse", "ward", "clinic", "dose"]


def example(i: int, text: str = "", rejected: str | None = None) -> Example:
    words = " ".join(WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] + str(i) for k in range(12))
    return Example(
        (Message("user", text or f"Explain {words}"), Message("assistant", f"answer {i}")),
        rejected,
        (),
        f"g{i}",
        f"f:{i}",
    )


def stage(
    renderer: Renderer, train: list[Example], validation: list[Example], test: list[Example], **fields: Any
) -> StageData:
    splits = Splits(tuple(train), tuple(validation), tuple(test), fields.pop("duplicates", 0))
    loaded = Loaded(tuple(train), "prompt_completion", 99, {"empty answer": 2}, "d", source="f.jsonl")
    return StageData.render(fields.pop("name", "general"), fields.pop("task", "sft"), [loaded], splits, renderer)


@pytest.fixture
def renderer(tiny_tokenizer: Any) -> Renderer:
    return Renderer(tiny_tokenizer, 256)


def test_the_figures(renderer: Renderer) -> None:
    data = stage(renderer, [example(i) for i in range(8)], [example(20)], [example(30), example(31)], duplicates=3)
    found = check_data([data], renderer).as_dict()["general"]
    assert found["counts"] == found["groups"] == {"train": 8, "validation": 1, "test": 2}
    # a byte a token: "answer i" and its end
    assert found["supervised"] == {"train": 8 * 9, "validation": 10, "test": 20}
    lengths = sorted(item.length for items in data.rendered.values() for item in items)
    assert found["lengths"]["max"] == lengths[-1]
    assert found["lengths"]["p50"] == lengths[5]
    assert found["lengths"]["mean"] == pytest.approx(sum(lengths) / 11, abs=0.05)
    assert (found["rows"], found["format"], found["duplicates"], found["truncated"]) == (99, "prompt_completion", 3, 0)
    assert found["dropped"] == {"empty answer": 2}
    assert (found["near_duplicates"], found["leakage"]) == (0, 0)
    shown = found["examples"][0]
    assert [shown["text"][start:end] for start, end in shown["supervised"]] == ["answer 0<|im_end|>"]
    assert json.loads(json.dumps(found)) == found


def test_near_duplicates_and_leaks_are_found_across_stages(renderer: Renderer) -> None:
    base = (
        "Write a note about the patient with chest pain who came to the ward last night and was given a dose of aspirin"
    )
    sft = stage(
        renderer,
        [example(1, base), example(2, base + " today"), *(example(i) for i in range(40, 60))],
        [example(3)],
        [example(4, base + " indeed")],
    )
    dpo = stage(
        renderer,
        [example(5, rejected="no")],
        [dataclasses.replace(example(6, base.upper(), rejected="no"), group="another")],
        [example(7, rejected="no")],
        name="preference",
        task="dpo",
    )
    check = check_data([sft, dpo], renderer)
    general, preference = check.as_dict()["general"], check.as_dict()["preference"]
    assert general["near_duplicates"] == 1
    assert (general["leakage"], general["leakage_exact"]) == (1, 0)
    assert (preference["leakage"], preference["leakage_exact"]) == (1, 1), (
        "the same prompt, trained on in another stage"
    )
    assert any("preference/validation f:6 ~ general/train f:1" in warning for warning in check.warnings)


def test_a_common_instruction_makes_no_two_texts_alike(renderer: Renderer) -> None:
    instruction = " ".join(f"word{k}" for k in range(80))
    items = [example(i, f"{instruction} {WORDS[i % 16]} {i} {WORDS[(i * 3) % 16]} {i}") for i in range(30)]
    assert similarity(*(shingles(item.prompt[0].content) for item in items[:2])) > 0.8, "alike as they stand"
    found = check_data([stage(renderer, items[:20], items[20:25], items[25:])], renderer).as_dict()["general"]
    assert (found["near_duplicates"], found["leakage"]) == (0, 0)


def test_training_on_the_same_example_in_two_stages_is_no_leak(renderer: Renderer) -> None:
    one = stage(renderer, [example(0), example(1)], [example(2)], [example(3)])
    two = stage(renderer, [example(0), example(1)], [example(2)], [example(3)], name="again")
    assert [found.leakage for found in check_data([one, two], renderer).stages] == [0, 0]


def test_chinese_is_compared_character_by_character() -> None:
    one = "患者发热三天伴咳嗽咳痰，查体双肺可闻及湿啰音，血常规示白细胞升高，考虑社区获得性肺炎，予抗感染治疗。"
    sets = [
        shingles(one),
        shingles(one.replace("三天", "五天")),
        shingles("今日天气晴朗，适合外出散步，大家心情愉快，孩子们在公园里玩耍。"),
    ]
    assert near_pairs(sets) == [(0, 1)]
    assert similarity(sets[0], sets[2]) == 0
    assert len(sets[0]) > 30


def test_empty_texts_are_like_nothing() -> None:
    sets = without_boilerplate([shingles(""), shingles("?!"), shingles("a"), shingles("a")], "ssss")
    assert near_pairs(sets) == [(2, 3)]


def test_an_empty_part_is_refused_if_it_has_a_share(renderer: Renderer) -> None:
    data = stage(renderer, [example(0), example(1)], [example(2)], [])
    with pytest.raises(DataError, match=r"stage general: the test part is empty\. Its 3 examples make 3 groups.*10%"):
        check_data([data], renderer, SplitSpec())
    assert check_data([data], renderer, SplitSpec(0.9, 0.1, 0.0)).as_dict()["general"]["counts"]["test"] == 0


def test_an_example_with_nothing_supervised_is_refused(renderer: Renderer) -> None:
    data = stage(renderer, [example(0), example(1)], [example(2)], [example(3)])
    first = data.rendered["train"][1]
    masked = dataclasses.replace(first, branches=tuple(Branch(b.ids, (False,) * len(b.ids)) for b in first.branches))
    broken = dataclasses.replace(data, rendered={**data.rendered, "train": (data.rendered["train"][0], masked)})
    with pytest.raises(DataError, match=r"stage general: 1 example without one supervised token in the answer.*f:1"):
        check_data([broken], renderer)


def test_of_an_extra_domain_the_sealed_test_is_looked_at_and_nothing_else(renderer: Renderer) -> None:
    general = stage(renderer, [example(i) for i in range(60)], [example(70 + i) for i in range(20)], [example(100)])
    law = stage(renderer, [example(200)], [], [example(300), example(3)], name="law")
    found = check_data([general], renderer, SplitSpec(), [law])
    assert [data.name for data in found.stages] == ["general", "law"]
    told = found.as_dict()["law"]
    assert told["counts"] == {"train": 0, "validation": 0, "test": 2}
    assert len(told["examples"]) == 2
    assert (told["leakage"], told["leakage_exact"]) == (1, 1), "a stage trains on an item of it"
    assert any(line.startswith("law: only 2 test examples") for line in found.warnings)
    assert any(line.startswith("law: 1 held-out example with the like") for line in found.warnings)
    assert not any("training examples" in line for line in found.warnings)


@pytest.mark.parametrize("change", ["masked", "endless", "empty"])
def test_an_extra_domain_that_cannot_be_scored_is_refused(renderer: Renderer, change: str) -> None:
    general = stage(renderer, [example(0)], [example(1)], [example(2)])
    law = stage(renderer, [example(3)], [], [] if change == "empty" else [example(4)], name="law")
    message = "stage law: the test part is empty"
    if change != "empty":
        item = law.rendered["test"][0]
        if change == "masked":
            branches = tuple(Branch(b.ids, (False,) * len(b.ids)) for b in item.branches)
            message = "stage law: 1 example without one supervised token in the answer"
        else:
            branches = tuple(Branch(b.ids[:-1], b.supervised[:-1]) for b in item.branches)
            message = "stage law: 1 answer without the end-of-turn token"
        broken = dataclasses.replace(item, branches=branches)
        law = dataclasses.replace(law, rendered={**law.rendered, "test": (broken,)})
    with pytest.raises(DataError, match=message):
        check_data([general], renderer, SplitSpec(), [law])


def test_an_answer_without_its_end_is_refused(renderer: Renderer) -> None:
    data = stage(renderer, [example(0)], [example(1)], [example(2)])
    endless = dataclasses.replace(
        data.rendered["test"][0],
        branches=tuple(Branch(b.ids[:-1], b.supervised[:-1]) for b in data.rendered["test"][0].branches),
        truncated=5,  # of its prompt: no excuse
    )
    broken = dataclasses.replace(data, rendered={**data.rendered, "test": (endless,)})
    with pytest.raises(DataError, match=r"1 answer without the end-of-turn token '<\|im_end\|>'.*f:2"):
        check_data([broken], renderer)


def test_cut_answers_are_counted_and_refused_if_all_are(tiny_tokenizer: Any) -> None:
    short = Renderer(tiny_tokenizer, 9)
    mixed = stage(short, [example(0), example(100)], [example(1)], [example(2)])
    check = check_data([mixed], short)
    found = check.as_dict()["general"]
    assert (found["truncated"], found["cut_answers"]) == (4, 1)
    assert any("1 answer cut off in the middle: longer than max_length 9" in warning for warning in check.warnings)
    with pytest.raises(DataError, match="every training answer is longer than max_length 9"):
        check_data([stage(short, [example(100)], [example(1)], [example(2)])], short)


def test_small_parts_are_warned_of(renderer: Renderer) -> None:
    text = "\n".join(check_data([stage(renderer, [example(0)], [example(1)], [example(2)])], renderer).warnings)
    assert "general: only 1 training example:" in text
    assert "only 1 validation example:" in text
    assert "only 1 test example:" in text


def test_examples_that_differ_in_numbers_only_are_warned_of(renderer: Renderer) -> None:
    """Six of one template among many: five say nothing new, with the places of two."""
    told = [dataclasses.replace(example(90 + i, f"Dose for {i} kg?"), origin=f"f:{90 + i}") for i in range(6)]
    others = [example(i) for i in range(40)]
    warnings = check_data([stage(renderer, [*others, *told], [], [])], renderer, SplitSpec(1, 0, 0)).warnings
    (warning,) = [line for line in warnings if "other numbers" in line]
    assert "5 of 46 training examples" in warning
    assert "f:90 ~ f:91: 'answer 90'" in warning
    assert "held out" not in warning
    held = check_data(
        [stage(renderer, [*others, *told[:4]], told[4:5], told[5:])], renderer, SplitSpec(1, 0, 0)
    ).warnings
    (warning,) = [line for line in held if "other numbers" in line]
    assert "3 of 44 training examples" in warning
    assert "so do 2 of those held out" in warning
    few = check_data([stage(renderer, [*others, *told[:3]], [], [])], renderer, SplitSpec(1, 0, 0)).warnings
    assert not any("other numbers" in line for line in few), "two of 43 are a matter of chance"
