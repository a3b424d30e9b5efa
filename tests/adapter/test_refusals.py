"""What is no plain ΔW = B·A on an unchanged base: refused by name, with the way out, nothing written."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from tests.conftest import make_tiny_model

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.adapter.peft_format import CONFIG, SIDECAR, WEIGHTS
from lorchestra.adapter.refusals import refuse
from lorchestra.errors import AdapterError

MADE_BY_PEFT = {
    "DoRA": ({"use_dora": True}, r"DoRA \(use_dora\).*train without DoRA"),
    "biases": ({"bias": "lora_only"}, r"trained biases \(bias=lora_only\).*bias='none'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias.*train without lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\].*merge_and_unload"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa.*path_initial_model_for_weight_conversion"),
    "PiSSA, fast": ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights=pissa_niter_2"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens, which is more than.*merge_and_unload"),
    "KaSA": ({"kasa_config": peft.tuners.lora.config.KasaConfig()}, "kasa_config, which is more than"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga, which changes the base"),
    "parameters": (
        {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
        "no modules .target_parameters",
    ),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "replicated layers.*merge_and_unload"),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"trained tokens.*merge_and_unload"),
}


def listing(directory):
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


@pytest.mark.parametrize("case", MADE_BY_PEFT)
def test_directories_of_plain_peft(case, tmp_path):
    settings, message = MADE_BY_PEFT[case]
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings)
    peft.get_peft_model(make_tiny_model(), config).save_pretrained(tmp_path / "a")
    before = listing(tmp_path / "a")
    with pytest.raises(AdapterError, match=message) as raised:
        Adapter.load(tmp_path / "a")
    assert str(tmp_path / "a") in str(raised.value)
    assert listing(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq"),
        ({"init_lora_weights": "corda"}, "init_lora_weights=corda"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga"),
        ({"init_lora_weights": "of next year"}, "of next year, which changes the base's weights"),
        ({"peft_type": "IA3"}, r"IA3 \(not LoRA\).*merge_and_unload"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"bias": "all"}, "bias=all"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.w1"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora, which is more than"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_of_next_year": True}, "use_of_next_year, which is more than"),
    ],
)
def test_configurations(tmp_path, settings, message):
    with pytest.raises(AdapterError, match=message):
        refuse({"peft_type": "LORA", **settings}, tmp_path)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "true"])
def test_plain_configurations_pass(tmp_path, init):
    refuse(
        {
            "peft_type": "LORA", "init_lora_weights": init, "bias": "none", "use_dora": False, "use_rslora": True,
            "use_qalora": False, "modules_to_save": None, "layer_replication": None, "unknown": "of another tool",
        },
        tmp_path,
    )  # fmt: skip
    refuse({}, tmp_path)


def test_other_tuners(tmp_path):
    """Whatever PEFT has that is not LoRA says so in its configuration."""
    for config in (
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"]),
    ):
        peft.get_peft_model(make_tiny_model(), config).save_pretrained(tmp_path / config.peft_type)
        with pytest.raises(AdapterError, match=rf"{config.peft_type.value} \(not LoRA\).*merge_and_unload"):
            Adapter.load(tmp_path / config.peft_type)


def test_convolutions(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"adapts '0', a convolution \(lora_A is \(2, 3, 3, 3\)\).*merge it into"):
        Adapter.load(tmp_path / "a")


def test_saved_embedding_layers(tmp_path):
    """PEFT saves whole embeddings beside the factors when the vocabulary was resized."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(make_tiny_model(), config).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(AdapterError, match=r"(embed_tokens|lm_head).* would be lost: merge it into its base"):
        Adapter.load(tmp_path / "a")


class TestNotAnAdapter:
    def directory(self, tmp_path):
        Adapter({"q": LowRank(torch.ones(3, 1), torch.ones(1, 3))}).save(tmp_path / "a")
        return tmp_path / "a"

    def test_only_a_pickle(self, tmp_path):
        directory = self.directory(tmp_path)
        (directory / WEIGHTS).rename(directory / "adapter_model.bin")
        with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle and is not read: load it in PEFT"):
            Adapter.load(directory)

    def test_no_weights(self, tmp_path):
        directory = self.directory(tmp_path)
        (directory / WEIGHTS).unlink()
        with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors$"):
            Adapter.load(directory)

    def test_no_directory(self, tmp_path):
        for path in (tmp_path / "absent", self.directory(tmp_path) / CONFIG):
            with pytest.raises(AdapterError, match=f"{path} is no directory"):
                Adapter.load(path)

    def test_a_whole_model(self, tiny_dir):
        with pytest.raises(AdapterError, match="this is a whole model, not an adapter"):
            Adapter.load(tiny_dir)

    def test_weights_that_are_a_pickle_by_another_name(self, tmp_path):
        directory = self.directory(tmp_path)
        torch.save({"q.lora_A.weight": torch.ones(1, 3)}, directory / WEIGHTS)
        with pytest.raises(AdapterError, match="not a safetensors file"):
            Adapter.load(directory)

    def test_an_evil_pattern_is_given_up_in_time(self, tmp_path, monkeypatch):
        from lorchestra.adapter import scales

        monkeypatch.setattr(scales, "PATTERN_SECONDS", 0.1)
        path = "model." + "a" * 60 + ".q_proj"
        Adapter({path: LowRank(torch.ones(3, 1), torch.ones(1, 3))}).save(tmp_path / "evil")
        (tmp_path / "evil" / SIDECAR).unlink()
        config = json.loads((tmp_path / "evil" / CONFIG).read_text())
        config["alpha_pattern"] = {r"(a|aa)+\.v_proj|(a|aa)+\.q_pro": 3}
        (tmp_path / "evil" / CONFIG).write_text(json.dumps(config))
        with pytest.raises(AdapterError, match="takes too long"):
            Adapter.load(tmp_path / "evil")
