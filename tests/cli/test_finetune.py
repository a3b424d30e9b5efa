"""``ft``, ``sft`` and ``dpo``: the article's commands, four data formats, a stop and a start again, wrong flags."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from tests.cli.conftest import dense_logits

from lorchestra.adapter.adapter import Adapter
from lorchestra.cli.training_flags import KEYS
from lorchestra.train.settings import LoraSettings, TrainSettings

ROWS = 24
SHAPES = {
    "prompt_completion": lambda i: {"prompt": f"Q{i}: fever?", "completion": f"Answer {i % 3}."},
    "messages": lambda i: {
        "messages": [
            {"role": "user", "content": f"病例{i}:发热三天,咳嗽?"},
            {"role": "assistant", "content": f"主诉:发热{i % 3}天。"},
        ]
    },
    "alpaca": lambda i: {"instruction": f"Name sign {i}", "input": "rash" if i % 2 else "", "output": f"sign {i % 3}"},
    "sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"hello {i}"}, {"from": "gpt", "value": f"bye {i % 3}"}]
    },
    "preference": lambda i: {"prompt": f"pair {i}?", "chosen": "Noted.", "rejected": "lol ok"},
}


def write(path: Path, shape: str, rows: int = ROWS) -> Path:
    path.write_text("".join(json.dumps(SHAPES[shape](i), ensure_ascii=False) + "\n" for i in range(rows)), "utf-8")
    return path


@pytest.fixture
def data(tmp_path) -> dict[str, Path]:
    return {shape: write(tmp_path / f"{shape}.jsonl", shape) for shape in SHAPES}


def test_the_articles_four_commands(lorchestra, tiny_dir, data, tmp_path):
    """swift → lorchestra, names of model and data sets → files; nothing else is changed."""
    stages = [f"./checkpoints/{name}" for name in ("adapter_stage1", "adapter_stage2", "adapter_stage3_dpo")]
    common = ["--model_name_or_path", tiny_dir]
    lora = ["--peft_type", "lora", "--lora_rank", 8]
    first = lorchestra("ft", *common, "--dataset", data["prompt_completion"], *lora, "--output_dir", stages[0])
    second = lorchestra("ft", *common, "--dataset", data["messages"], *lora, "--output_dir", stages[1])
    third = lorchestra(
        "dpo", *common, "--dataset", data["preference"], "--ref_adapter_path", stages[1], "--output_dir", stages[2]
    )
    for told, stage in ((first, stages[0]), (second, stages[1]), (third, stages[2])):
        assert told.code == 0, told.err
        assert f"lorchestra chat {Path(stage)}" in told.out
    assert "loss 0.693 →" in third.out  # the preference law: ln 2 before the first step
    assert third.out.rstrip().endswith("-a ./checkpoints/adapter_stage2")

    merged = lorchestra(
        "merge-lora", "--base_model", tiny_dir, "--adapters", ",".join(stages), "--weights", "0.3,0.5,0.2",
        "--output_dir", "./merged_model_medical_assistant",
    )  # fmt: skip
    assert merged.code == 0, merged.err
    assert "was trained beside adapter_stage2 at 1; with adapter_stage3_dpo at 0.2 that is 0.2, but it is" in merged.err
    assert "parity: 0.00%" in merged.out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([[1, 40, 41, 42, 90, 2]])
    expected = dense_logits(tiny_dir, dict(zip(map(Path, stages), (0.3, 0.5, 0.2), strict=True)), ids)
    model = AutoModelForCausalLM.from_pretrained("merged_model_medical_assistant", dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dense_logits(tiny_dir, {}, ids), expected, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained("merged_model_medical_assistant")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_dir).chat_template


def test_what_dpo_trained_beside_is_in_its_lineage_and_unchanged(lorchestra, tiny_dir, data, make_adapter, tmp_path):
    beside = make_adapter(tmp_path / "notes", seed=1)
    before = (beside / "adapter_model.safetensors").read_bytes()
    told = lorchestra(
        "dpo", "--model_name_or_path", tiny_dir, "--dataset", data["preference"], "--ref_adapter_path", "notes=0.5",
        "--output_dir", "style", "--max_steps", 3, "--loss_type", "ipo", "--beta", 0.5, "--dtype", "float32", "--json",
    )  # fmt: skip
    summary = json.loads(told.out)
    assert summary["loss_before"] == pytest.approx(1 / (4 * 0.5**2), rel=1e-5)
    adapter = Adapter.load("style")
    assert [(p.name, p.digest, p.coefficient) for p in adapter.lineage.context] == [
        ("notes", Adapter.load(beside).digest, 0.5)
    ]
    assert adapter.digest == summary["digest"]
    assert (beside / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("shape", ["prompt_completion", "messages", "alpaca", "sharegpt"])
def test_every_format_just_trains(lorchestra, tiny_dir, data, shape):
    told = lorchestra(
        "sft", "--model-name-or-path", tiny_dir, "--dataset", data[shape], "--output-dir", "医疗", "--max-steps", 2,
        "--lora-rank", 2, "--target-modules", "q_proj,v_proj", "--json",
    )  # fmt: skip
    assert told.code == 0, told.err
    summary = json.loads(told.out)
    assert summary["examples"]["train"] + summary["examples"]["validation"] == ROWS
    assert f"{shape} (detected" in told.err
    config = json.loads(Path("医疗/adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 2, False)
    assert {name.rsplit(".", 1)[-1] for name in config["target_modules"]} == {"q_proj", "v_proj"}


def test_the_adapter_works_in_plain_peft(lorchestra, tiny_dir, data):
    from transformers import AutoModelForCausalLM

    told = lorchestra(
        "ft", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"], "--output_dir", "out", "--max_steps", 5,
        "--learning_rate", 0.01, "--init_method", "rescaled", "--scaling", "lora", "--lora_alpha", 4,
    )  # fmt: skip
    assert told.code == 0, told.err
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), "out").eval()
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        found = plain(input_ids=ids).logits
    torch.testing.assert_close(found.double(), dense_logits(tiny_dir, {Path("out"): 1.0}, ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.double(), dense_logits(tiny_dir, {}, ids), atol=1e-3)


def test_several_data_sets_and_fields(lorchestra, tiny_dir, data, tmp_path):
    (tmp_path / "odd.csv").write_text("ask,say\n" + "".join(f"why {i}?,because {i}\n" for i in range(12)))
    told = lorchestra(
        "ft", "--model_name_or_path", tiny_dir, "--dataset", "odd.csv", "--field", "prompt=ask", "--field",
        "completion={{ say }}!", "--max_samples", 10, "--output_dir", "out", "--max_steps", 1, "--json",
    )  # fmt: skip
    assert json.loads(told.out)["examples"]["train"] <= 10
    both = f"{data['alpaca']},{data['sharegpt']}"
    told = lorchestra(
        "ft", "--model_name_or_path", tiny_dir, "--dataset", both, "--output_dir", "out", "--max_steps", 1, "--json"
    )
    assert sum(json.loads(told.out)["examples"].values()) == 2 * ROWS
    assert len(Adapter.load("out").lineage.data) == 2


def test_a_handful_of_examples_trains_without_validation(lorchestra, tiny_dir, tmp_path):
    write(tmp_path / "few.jsonl", "alpaca", rows=2)
    common = ("ft", "--model_name_or_path", tiny_dir, "--dataset", "few.jsonl", "--output_dir", "out", "--max_steps", 2)
    told = lorchestra(*common)
    assert told.code == 0, told.err
    assert "trained without validation" in told.err
    assert "; no validation" in told.out
    lorchestra(*common, "--val_ratio", 0.1).refused("the validation part is empty")


def test_a_repeated_command_is_answered_from_the_cache(lorchestra, tiny_dir, data):
    asked = ("ft", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"], "--output_dir", "out", "--max_steps",
             3, "--json")  # fmt: skip
    first = json.loads(lorchestra(*asked).out)
    again = lorchestra(*asked, "--save_steps", 1)
    assert json.loads(again.out)["cached"]
    assert not first["cached"]
    assert json.loads(again.out)["digest"] == first["digest"] == Adapter.load("out").digest
    assert "train out" not in again.err
    other = json.loads(lorchestra(*asked, "--seed", 1).out)
    assert not other["cached"]
    assert other["digest"] != first["digest"]


def test_interrupted_and_started_again_it_goes_on(lorchestra, tiny_dir, data, monkeypatch, tmp_path):
    from lorchestra.train.loop import Loop

    asked = ("ft", "--model_name_or_path", tiny_dir, "--dataset", data["messages"], "--output_dir", "out",
             "--max_steps", 8, "--save_steps", 2, "--lora_dropout", 0.1, "--json")  # fmt: skip
    step = Loop._step

    def interrupted(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", interrupted)
        assert lorchestra(*asked).code == 130
    assert not Path("out").exists()
    told = lorchestra(*asked)
    assert "resumed after step 4 of 8" in told.err
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "elsewhere"))
    assert json.loads(told.out)["digest"] == json.loads(lorchestra(*asked).out)["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_run_again_it_ends_with_the_same_adapter(lorchestra, tiny_dir, data, tmp_path, monkeypatch, how):
    asked = ["ft", "--model_name_or_path", str(tiny_dir), "--dataset", str(data["messages"]), "--output_dir", "out",
             "--max_steps", "120", "--save_steps", "2", "--json"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "lorchestra", *asked], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    steps = tmp_path / "home" / "steps"
    try:
        deadline = time.monotonic() + 120
        # Digits alone: a checkpoint that is still being written ends in .partial.
        while not list(steps.glob("*.work/scratch/step-*[0-9]")) and time.monotonic() < deadline:
            time.sleep(0.05)
            assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.send_signal(how)
        said = process.communicate()[1]
    assert not Path("out").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130
        kept = re.fullmatch(r"stopped; (\d+) of 120 steps of out are kept, and .*", said.splitlines()[-1])
        assert kept, said
        assert "Traceback" not in said
    told = lorchestra(*asked)
    assert f"resumed after step {kept[1] if how == signal.SIGINT else ''}" in told.err
    monkeypatch.setenv("LORCHESTRA_HOME", str(tmp_path / "elsewhere"))
    assert json.loads(told.out)["digest"] == json.loads(lorchestra(*asked).out)["digest"]


def test_trackers_get_their_directory(lorchestra, tiny_dir, data):
    told = lorchestra(
        "ft", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"], "--output_dir", "out", "--max_steps", 1,
        "--report_to", "tensorboard",
    )  # fmt: skip
    assert told.code == 0, told.err
    assert list(Path("runs/out").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peft_type", "dora"], ["--peft_type dora", "only lora"]),
        (["--lora_rank", "0"], ["--lora_rank", "got 0"]),
        (["--scaling", "rslra", "--learning_rate", "-1"], ["--scaling", "'rslora'", "--learning_rate", "got -1"]),
        (["--init_method", "pissa"], ["--init_method", "rescaled"]),
        (["--target_modules", "q_prj"], ["'q_prj' matches no linear module", "'q_proj'"]),
        (["--report_to", "wandbb"], ["--report_to", "wandb"]),
        (["--device", "tpu"], ["--device", "'tpu'", "cpu"]),
        (["--format", "alpca"], ["'alpca'", "'alpaca'"]),
        (["--field", "prompt"], ["--field 'prompt'", "PART=COLUMN"]),
        (["--adapter", "./nothere"], ["error: --adapter: source './nothere'"]),
        (["--dataset", "nothere.jsonl"], ["error: --dataset: source 'nothere.jsonl': there is no"]),
        (["--field", "prmpt=instruction"], ["error: --field: unknown part 'prmpt'", "Did you mean 'prompt'?"]),
        (["--field", "prompt=ask", "--field", "completion=output"], ["--field prompt: there is no column 'ask'"]),
        (["--model_name_or_path", "nothere"], ["'nothere'", "there is no"]),
        (["--adapter", "nothere"], ["'nothere'", "there is no"]),
        (["--adapter", "notes=much"], ["notes=much", "'much' is not a finite number"]),
        (["--adapter", "out"], ["--output_dir out is adapter 'out'"]),
        (["--output_dir", "alpaca.jsonl"], ["alpaca.jsonl is a file"]),
        (["--output_dir", "taken"], ["taken is not empty and holds no adapter"]),
        (["--learning_rte", "1"], ["--learning_rte", "--learning_rate"]),
    ],
)
def test_a_wrong_flag_is_told_and_nothing_is_written(lorchestra, tiny_dir, data, make_adapter, tmp_path, flags, words):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    there = sorted(p.name for p in tmp_path.iterdir())
    told = lorchestra(
        "ft", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"], "--output_dir", "out", *flags
    )
    told.refused(*words)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == [n for n in there if n != "home"]
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_adapters_and_data_of_the_wrong_kind_are_refused(
    lorchestra, tiny_dir, other_base, data, make_adapter, tmp_path
):
    make_adapter(tmp_path / "foreign", seed=1, base=other_base)
    lorchestra(
        "ft", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"], "--output_dir", "out", "-a", "foreign"
    ).refused("adapter foreign was trained on", "weights are not those of")
    lorchestra("dpo", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"], "--output_dir", "out").refused(
        "alpaca.jsonl:1", "no rejected answer"
    )
    lorchestra(
        "dpo", "--model_name_or_path", tiny_dir, "--dataset", data["preference"], "--output_dir", "out",
        "--ref_adapter_path", "./nothere",
    ).refused("error: --ref_adapter_path: source './nothere'")  # fmt: skip
    lorchestra("ft", "--model_name_or_path", tiny_dir, "--dataset", ",", "--output_dir", "out").refused(
        "--dataset is empty"
    )
    lorchestra("ft", "--model_name_or_path", "foreign", "--dataset", data["alpaca"], "--output_dir", "out").refused(
        "'foreign' is an adapter, not a model"
    )
    lorchestra("ft", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"]).refused("--output_dir")
    lorchestra("ft", "--lora_rank", 4).refused("Missing: --model_name_or_path, --dataset, --output_dir.")


def test_an_adapter_that_is_there_is_replaced_and_other_files_are_kept(
    lorchestra, tiny_dir, data, make_adapter, tmp_path
):
    old = Adapter.load(make_adapter(tmp_path / "out", seed=1)).digest
    (tmp_path / "out" / "README.md").write_text("about")
    told = lorchestra(
        "ft", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"], "--output_dir", "out", "--max_steps", 1
    )
    assert told.code == 0, told.err
    assert Adapter.load("out").digest != old
    assert (tmp_path / "out" / "README.md").read_text() == "about"


def test_the_flags_defaults_are_the_recipes_but_for_patience_or_settled_from_the_examples(lorchestra, tiny_dir, data):
    """One set of defaults; what differs is chosen for one data set alone and stands here."""
    told = lorchestra(
        "ft", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"], "--output_dir", "out", "--dtype", "float32"
    )
    assert told.code == 0, told.err
    settings = Adapter.load("out").lineage.settings
    lora = LoraSettings(dropout=0.1)
    assert LoraSettings.model_validate(settings["lora"]) == lora
    train = TrainSettings(epochs=6.0, patience=2, learning_rate=5e-4)
    assert settings["train"] == train.model_dump(mode="json", exclude={"report_to", "checkpoint_every"})
    settled = re.findall(r"^  out: (--\w+) (\S+) \(", told.err, re.MULTILINE)
    assert settled == [
        ("--lora_rank", "8"), ("--lora_dropout", "0.1"), ("--num_train_epochs", "6"), ("--learning_rate", "0.0005"),
    ]  # fmt: skip


def test_a_flag_that_is_given_is_not_settled(lorchestra, tiny_dir, data):
    given = {
        "lora_rank": ("lora", "rank", 2), "lora_dropout": ("lora", "dropout", 0.0),
        "lora_alpha": ("lora", "alpha", 3.0),
        "num_train_epochs": ("train", "epochs", 1.0), "learning_rate": ("train", "learning_rate", 2e-4),
    }  # fmt: skip
    flags = [word for flag, (_, _, value) in given.items() for word in (f"--{flag}", value)]
    common = ("ft", "--model_name_or_path", tiny_dir, "--dataset", data["alpaca"], "--output_dir", "out", "--json")
    told = lorchestra(*common, *flags)
    assert told.code == 0, told.err
    settings = Adapter.load("out").lineage.settings
    assert {flag: settings[section][key] for flag, (section, key, _) in given.items()} == {
        flag: value for flag, (_, _, value) in given.items()
    }
    assert [found["key"] for found in json.loads(told.out)["suggestions"]] == ["folds"]
    assert "not set" not in told.err


def test_preferences_have_a_smaller_learning_rate(lorchestra, tiny_dir, data):
    common = ("dpo", "--model_name_or_path", tiny_dir, "--dataset", data["preference"], "--output_dir", "out")
    told = lorchestra(*common, "--max_steps", 1, "--json")
    assert told.code == 0, told.err
    found = {row["key"]: row["value"] for row in json.loads(told.out)["suggestions"]}
    assert found["train.learning_rate"] == 5e-5
    assert "train.epochs" not in found, "max_steps says how long"


def test_every_flag_with_a_key_of_the_recipe_reaches_it():
    fields = {"lora": LoraSettings, "train": TrainSettings}
    for flag, path in KEYS.items():
        if path[0] in fields:
            assert path[1] in fields[path[0]].model_fields, flag
