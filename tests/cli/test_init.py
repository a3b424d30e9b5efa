"""``init``: the recipe it writes loads, says what each key is, and can be run."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorchestra.cli.starter import GENERAL, PREFERENCE, SPECIALISED, StarterData, example_rows, recipe_text
from lorchestra.recipe.recipe import Recipe
from lorchestra.recipe.sections import Stage


@pytest.fixture
def files(tmp_path):
    """Three files of a user."""
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": f"q{i}", "output": f"a{i}"} for i in range(60)]))
    (tmp_path / "clinic notes.csv").write_text("question,answer\n" + "".join(f"cq{i},ca{i}\n" for i in range(60)))
    with (tmp_path / "pairs.jsonl").open("w") as out:
        for i in range(60):
            out.write(json.dumps({"prompt": f"p{i}", "chosen": "good", "rejected": "bad"}) + "\n")
    (tmp_path / "odd.csv").write_text("frage,antwort\n" + "".join(f"f{i},a{i}\n" for i in range(60)))
    return tmp_path


def names(recipe: Recipe) -> list[str]:
    return [stage.name for stage in recipe.stages]


def uncommented(text: str) -> str:
    """With the lines of commented stages made active: what a user does by hand."""
    return re.sub(r"^  # (?=- name:|  \S|    )", "  ", text, flags=re.MULTILINE)


def test_without_files_there_is_example_data_and_it_is_ready_to_run(lorchestra, tmp_path):
    told = lorchestra("init", "my model")
    assert told.code == 0, told.err
    for name in ("recipe.yaml", "general.jsonl", "specialised.jsonl"):
        assert f"wrote my model/{name}" in told.out
    recipe = Recipe.load(tmp_path / "my model" / "recipe.yaml")
    recipe.check_sources()
    assert names(recipe) == [GENERAL, SPECIALISED]
    assert recipe.name == "my-model"
    assert recipe.stages[1].context.keys() == {GENERAL}
    for name in (GENERAL, SPECIALISED):
        rows = [json.loads(line) for line in (tmp_path / "my model" / f"{name}.jsonl").read_text().splitlines()]
        assert len({row["prompt"] for row in rows}) == 60
        assert all(row["completion"].strip() for row in rows)


def test_the_example_passes_the_check(lorchestra, tmp_path, tiny_dir):
    lorchestra("init", "--base", tiny_dir)
    told = lorchestra("check", "recipe.yaml", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)["stages"]
    for stage in (GENERAL, SPECIALISED):
        assert all(count >= part for count, part in zip(found[stage]["counts"].values(), (35, 8, 8), strict=True))
    assert found[GENERAL]["leakage"] == found[SPECIALISED]["leakage"] == 0


@pytest.mark.slow
def test_the_example_runs(lorchestra, tmp_path, tiny_dir):
    lorchestra("init", "--base", tiny_dir)
    told = lorchestra("run", "recipe.yaml")
    assert told.code == 0, told.err
    assert "The delivered model" in told.out


def test_every_key_of_the_recipe_is_explained(lorchestra, tmp_path):
    lorchestra("init")
    text = (tmp_path / "recipe.yaml").read_text()
    for key in Recipe.model_fields.keys() - {"adapters"}:
        line = next(i for i, line in enumerate(text.splitlines()) if line.startswith(f"{key}:"))
        own, before = text.splitlines()[line], text.splitlines()[line - 1]
        assert "#" in own or before.startswith("#"), key
    assert "# adapters: {" in text
    assert "# - name: preference" in text


def test_commented_stages_are_good_once_the_comment_is_gone(lorchestra, tmp_path):
    lorchestra("init")
    text = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "all.yaml").write_text(uncommented(text))
    recipe = Recipe.load(tmp_path / "all.yaml")
    assert names(recipe) == [GENERAL, SPECIALISED, PREFERENCE]
    preference = recipe.stage(PREFERENCE)
    assert preference.task == "dpo"
    assert preference.context.keys() == {GENERAL, SPECIALISED}
    assert preference.context[GENERAL].schedule == "cosine"


def test_own_files_go_to_the_stages_they_fit(lorchestra, files):
    told = lorchestra("init", "out", "--data", "pairs.jsonl", "--data", "alpaca.json", "--data", "clinic notes.csv",
                      "--base", "org/model")  # fmt: skip
    assert told.code == 0, told.err
    assert "alpaca.json: alpaca (detected; instruction, output" in told.out
    recipe = Recipe.load(files / "out" / "recipe.yaml")
    recipe.check_sources()
    assert recipe.base == "org/model"
    assert {stage.name: (stage.task, stage.data[0].source) for stage in recipe.stages} == {
        GENERAL: ("sft", "../alpaca.json"),
        SPECIALISED: ("sft", "../clinic notes.csv"),
        PREFERENCE: ("dpo", "../pairs.jsonl"),
    }
    assert "alpaca, detected: 60 rows, 60 examples" in (files / "out" / "recipe.yaml").read_text()
    assert not (files / "out" / "general.jsonl").exists()


@pytest.mark.parametrize(
    ("data", "active"),
    [
        (["alpaca.json"], [GENERAL]),
        (["pairs.jsonl"], [PREFERENCE]),
        (["alpaca.json", "pairs.jsonl"], [GENERAL, PREFERENCE]),
        (["alpaca.json", "clinic notes.csv"], [GENERAL, SPECIALISED]),
    ],
)
def test_a_stage_without_a_file_waits_as_a_comment(data, active, lorchestra, files):
    assert lorchestra("init", *(word for name in data for word in ("--data", name))).code == 0
    recipe = Recipe.load(files / "recipe.yaml")
    recipe.check_sources()
    assert names(recipe) == active
    text = (files / "recipe.yaml").read_text()
    assert {GENERAL, SPECIALISED, PREFERENCE} - set(active) == set(
        re.findall(r"^  # - name: (\w+)", text, re.MULTILINE)
    )
    (files / "all.yaml").write_text(uncommented(text))
    assert names(Recipe.load(files / "all.yaml")) == [GENERAL, SPECIALISED, PREFERENCE]


def test_a_file_of_its_own_shape_is_mapped(lorchestra, files):
    lorchestra("init", "--data", "odd.csv").refused("cannot tell the format", "frage", "--field 'completion=<column>'")
    assert not (files / "recipe.yaml").exists()
    told = lorchestra("init", "--data", "odd.csv", "--field", "prompt=frage", "--field", "completion={{ antwort }}!")
    assert told.code == 0, told.err
    entry = Recipe.load(files / "recipe.yaml").stages[0].data[0]
    assert entry.fields == {"prompt": "frage", "completion": "{{ antwort }}!"}


def test_nothing_is_overwritten_without_force(lorchestra, files):
    (files / "recipe.yaml").write_text("mine")
    lorchestra("init", "--data", "nowhere.jsonl").refused("'nowhere.jsonl': there is no")
    lorchestra("init", "--data", "alpaca.json").refused("recipe.yaml: there already", "--force")
    assert (files / "recipe.yaml").read_text() == "mine"
    (files / "recipe.yaml").unlink()
    (files / "general.jsonl").write_text("mine")
    lorchestra("init").refused("general.jsonl: there already")
    assert (files / "general.jsonl").read_text() == "mine"
    assert not (files / "recipe.yaml").exists()
    assert lorchestra("init", "--force").code == 0
    assert Recipe.load(files / "recipe.yaml").stages


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "alpca.json"], ["there is no", "did you mean 'alpaca.json'?"]),
        (["--base", "s3://bucket/model"], ["unknown kind; use a path, hf:org/name or pip:"]),
        (["alpaca.json"], ["alpaca.json is a file; name the directory"]),
        (["--field", "prompt=a"], ["give exactly one --data"]),
    ],
)
def test_a_mistake_writes_nothing(argv, words, lorchestra, files):
    before = set(files.iterdir())
    lorchestra("init", *argv).refused(*words)
    assert set(files.iterdir()) == before


@given(
    source=st.text(
        st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cc", "Cs"]), min_size=1
    ),
    base=st.sampled_from(
        ["org/model", "hf:a/b@v1", "pip:x==1/y.gguf", "C:/models/x", "./a b", "~/m", "null", "3", "a: b"]
    ),
)
def test_any_file_name_survives_the_recipe(source, base):
    from lorchestra.recipe.text import Document

    text = recipe_text(
        "x", base, {GENERAL: [StarterData(source, "about")], PREFERENCE: [StarterData(source, "", {"prompt": source})]}
    )

    class Written:
        suffix = ".yaml"

        def read_text(self, encoding):
            return text

        def __str__(self):
            return "x"

    values = Document.read(Written()).values  # type: ignore[arg-type]
    assert values["base"] == base
    assert values["stages"][0]["data"] == source
    assert values["stages"][1]["data"] == [{"source": source, "fields": {"prompt": source}}]


def test_the_names_of_its_stages_may_be_used():
    for name, rows in example_rows().items():
        assert Stage(name=name, data=[{"source": "x"}]).name == name
        assert len(rows) == 60
