"""PEFT directories, both ways, with plain PEFT as the oracle; damage is found and named."""

from __future__ import annotations

import json
import random
import resource
from collections import OrderedDict

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_tiny_model

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Lineage, Parent
from lorchestra.adapter.lowrank import LowRank
from lorchestra.adapter.peft_format import CONFIG, SIDECAR, WEIGHTS, effective_scales
from lorchestra.bank import Bank, linear_shape
from lorchestra.errors import AdapterError, StorageError
from lorchestra.fusion.methods import compress, fuse

IDS = torch.randint(4, 48, (2, 9), generator=torch.Generator().manual_seed(0))


def make_gpt2():
    """Conv1D modules, which store their weight [in, out], beside a Linear head of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False,
        initializer_range=0.15, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).float().eval().requires_grad_(False)


def make_odd():
    """Names that mean something to regular expressions, and a path that ends in another module's whole path."""
    model = make_tiny_model()
    first = model.model.layers[0].mlp
    first.up_proj = torch.nn.Sequential(OrderedDict({r"w+1 [x]{2}|é$(\d)": first.up_proj}))
    inner = torch.nn.Sequential(OrderedDict(gate_proj=model.model.layers[1].mlp.up_proj))
    for name in ("mlp", "0", "layers", "model"):
        inner = torch.nn.Sequential(OrderedDict({name: inner}))
    model.model.layers[1].mlp.up_proj = inner
    return model


def adapter_for(model, rank_of, seed=0, lineage=None):
    """Random factors for every linear module that ``rank_of`` gives a rank."""
    generator = torch.Generator().manual_seed(seed)
    modules, transposed = {}, set()
    for path, module in model.named_modules():
        shape, rank = linear_shape(module), rank_of(path)
        if shape and rank:
            m, n = shape
            B = torch.randn(m, rank, generator=generator) * 0.3
            modules[path] = LowRank(B, torch.randn(rank, n, generator=generator) * 0.3)
            if type(module).__name__ == "Conv1D":
                transposed.add(path)
    return Adapter(modules, BaseId("tiny"), lineage or Lineage(), frozenset(transposed))


def simple(seed=0):
    return adapter_for(make_tiny_model(), lambda path: 3 * path.endswith(("q_proj", "down_proj")), seed)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def mixed(path):
    return {"q_proj": 4, "v_proj": 2, "gate_proj": 7, "up_proj": 4, "down_proj": 1}.get(path.rsplit(".", 1)[-1], 0)


def nested(path, outer, inner):
    """Common rank 2; ``outer`` for the module that another one's path ends in, ``inner`` for that other one."""
    if "up_proj.model" in path:
        return inner
    return outer if path == "model.layers.0.mlp.gate_proj" else 2 * path.endswith(("gate_proj", "q_proj"))


OURS = {
    "one rank": (make_tiny_model, lambda path: 4 * path.endswith("proj")),
    "mixed ranks": (make_tiny_model, mixed),
    "some layers": (make_tiny_model, lambda path: 3 * (path.startswith("model.layers.1.") and path.endswith("v_proj"))),
    "another rank per layer": (make_tiny_model, lambda path: (1 + path.count(".1.")) * path.endswith("q_proj")),
    "Conv1D": (make_gpt2, lambda path: 3 * path.endswith(("c_attn", "c_proj", "c_fc"))),
    "Conv1D and Linear, mixed ranks": (make_gpt2, lambda path: {"c_attn": 2, "c_proj": 5}.get(path[-6:], 3)),
    "odd names": (make_odd, lambda path: 5 if "+" in path else 2 * path.endswith(("gate_proj", "q_proj"))),
    # Of model.layers.0.mlp.gate_proj and a path that ends in it: one has the common rank, or neither.
    "a path ends in another's": (make_odd, lambda path: nested(path, outer=4, inner=2)),
    "a path that is another's end": (make_odd, lambda path: nested(path, outer=2, inner=4)),
    "both uncommon": (make_odd, lambda path: nested(path, outer=3, inner=4)),
}


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_plain_peft_applies_exactly(case, tmp_path):
    make, rank_of = OURS[case]
    model = make()
    adapter = adapter_for(model, rank_of)
    adapter.save(tmp_path / "a")
    base = logits(model)
    bank = Bank(model)
    bank.load("a", adapter)
    with bank.using({"a": 1.0}):
        expected = logits(model)
    found = logits(peft.PeftModel.from_pretrained(make(), tmp_path / "a").eval())
    assert (expected - base).norm() > 0.1 * base.norm(), "the adapter must matter, or the law is vacuous"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", OURS)
def test_round_trip_keeps_everything(case, tmp_path):
    make, rank_of = OURS[case]
    lineage = Lineage(
        made_by="stage",
        name="clinic",
        task="sft",
        parents=(Parent("a", "sha256:1", -0.25),),
        context=(Parent("general", "sha256:2", 0.5), Parent("é", "sha256:3", 1.0)),
        data={"clinic": "sha256:4"},
        settings={"lora": {"rank": 3}},
        metrics={"validation_loss": 1.25},
        tools={"torch": "2"},
    )
    adapter = adapter_for(make(), rank_of, lineage=lineage)
    assert adapter.save(tmp_path / "a") == tmp_path / "a"
    found = Adapter.load(tmp_path / "a")
    assert found.digest == adapter.digest
    assert (found.base, found.lineage, found.transposed) == (adapter.base, lineage, adapter.transposed)
    for path, update in adapter.modules.items():
        assert torch.equal(found.modules[path].B, update.B)
        assert torch.equal(found.modules[path].A, update.A)
    assert set(effective_scales(tmp_path / "a").values()) == {1.0}
    found.save(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted([CONFIG, WEIGHTS, SIDECAR])
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_written_leaves_no_scale_to_get_wrong(tmp_path):
    """alpha = r, no rsLoRA, alpha_pattern = rank_pattern by escaped full paths, explicit target modules."""
    adapter = adapter_for(make_odd(), mixed)
    adapter.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["lora_alpha"] == config["r"]
    assert config["use_rslora"] is config["use_dora"] is False
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert set(config["target_modules"]) == set(adapter.modules)
    assert r"model\.layers\.0\.self_attn\.v_proj" in config["rank_pattern"]
    assert (config["bias"], config["lora_dropout"], config["modules_to_save"]) == ("none", 0.0, None)
    assert config["base_model_name_or_path"] == "tiny"
    sidecar = json.loads((tmp_path / "a" / SIDECAR).read_text())
    assert (sidecar["schema"], sidecar["digest"]) == (1, adapter.digest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_in_half_precision(dtype, tmp_path):
    adapter = simple()
    adapter.save(tmp_path / "a", dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "a" / WEIGHTS).values()} == {dtype}
    found = Adapter.load(tmp_path / "a")
    for path, update in adapter.modules.items():
        assert found.modules[path].B.dtype == torch.float32
        assert torch.equal(found.modules[path].B, update.B.to(dtype).float())
        assert torch.equal(found.modules[path].A, update.A.to(dtype).float())
    assert found.digest == json.loads((tmp_path / "a" / SIDECAR).read_text())["digest"] != adapter.digest
    model = make_tiny_model()
    bank = Bank(model)
    bank.load("a", found)
    with bank.using({"a": 1.0}):
        expected = logits(model)
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(make_tiny_model(), tmp_path / "a").eval()), expected, rtol=1e-5, atol=1e-5
    )


FOREIGN = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 5}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 5, "model.layers.0.self_attn.q_proj": 32}},
    "both": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"self_attn.v_proj": 3, r"layers\.1\..*": 7}},
    "both, rslora": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "expressions": {
        "rank_pattern": {r".*\.(q|k)_proj": 3, r"layers\.1\.mlp\.\w+": 6},
        "alpha_pattern": {r"(?:.*)\.0\..*up.*": 9, r"^model.layers.1.*": 1},
    },
    "the first of two that match": {"alpha_pattern": {r"layers\.\d+\.mlp\..*": 3, "up_proj": 30}},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "an expression of targets": {"target_modules": r".*layers\.0\..*(up|down)_proj"},
    "the gaussian start": {"init_lora_weights": "gaussian"},
    "the orthogonal start": {"init_lora_weights": "orthogonal"},
    "the start from minor components": {"init_lora_weights": "mica"},
    "EVA": {"init_lora_weights": "eva"},
    "a trained head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "embeddings, rslora, patterns": {
        "target_modules": ["embed_tokens", "q_proj"], "use_rslora": True, "rank_pattern": {"embed_tokens": 2},
        "alpha_pattern": {"embed_tokens": 3},
    },
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "layers and their pattern": {
        "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers",
    },
    "excluded modules": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "VeLoRA": {"target_modules": ["q_proj"], "velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
}  # fmt: skip


def train_by_hand(model, seed=5):
    """Random factors, in place of training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def lora_layers(model):
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("tied", [True, False])
def test_directories_of_plain_peft_mean_what_peft_means(case, tied, tmp_path):
    """Saved as PEFT saves by default, which puts the base's whole embedding and head beside factors for them."""
    settings = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"} | FOREIGN[case]

    def make():
        return make_tiny_model(tie_word_embeddings=tied)

    model = train_by_hand(peft.get_peft_model(make(), peft.LoraConfig(**settings, task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "a")
    found, scales = Adapter.load(tmp_path / "a"), effective_scales(tmp_path / "a")
    # As PEFT reads it: saving sorts the patterns, so that another one may come first than in training.
    layers = lora_layers(peft.PeftModel.from_pretrained(make(), tmp_path / "a"))
    assert set(found.modules) == set(scales) == set(layers)
    for path, layer in layers.items():
        embedding = isinstance(layer.get_base_layer(), torch.nn.Embedding)
        assert (path in found.embeddings) == (path in found.transposed) == embedding
        assert scales[path] == pytest.approx(layer.scaling["default"], rel=1e-12)
        ours = found.modules[path].dense().T if embedding else found.modules[path].dense()
        assert float(ours.norm()) > 0
        torch.testing.assert_close(ours, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    assert found.lineage.made_by == "foreign"
    assert found.base.weights == "", "without our sidecar the base is unverified"


@pytest.mark.parametrize("case", [case for case in FOREIGN if "embeddings" in case])
def test_embeddings_written_by_us_plain_peft_applies_exactly(case, tmp_path):
    """PEFT's directory, read and written again, gives PEFT the same logits; and so does a fusion of it with itself."""
    settings = {"r": 4, "lora_alpha": 10} | FOREIGN[case]

    def make():
        return make_tiny_model(tie_word_embeddings=False)

    model = train_by_hand(peft.get_peft_model(make(), peft.LoraConfig(**settings, task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "a")
    ours = Adapter.load(tmp_path / "a")
    ours.save(tmp_path / "b")
    assert Adapter.load(tmp_path / "b").digest == ours.digest
    assert Adapter.load(tmp_path / "b").embeddings == ours.embeddings
    fuse([ours, ours], [1.5, -0.5]).save(tmp_path / "c")
    compress(fuse([ours, ours], [1.5, -0.5]), rank=4)[0].save(tmp_path / "d")
    expected = logits(model.eval())
    assert (expected - logits(make())).norm() > 0.1 * expected.norm()
    for name in "bcd":
        found = logits(peft.PeftModel.from_pretrained(make(), tmp_path / name).eval())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flag", [True, False])
def test_conv1d_directories_of_plain_peft(flag, tmp_path):
    """PEFT's delta is [in, out] where the weight is; ours is always [out, in]."""
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj"], fan_in_fan_out=flag)
    model = train_by_hand(peft.get_peft_model(make_gpt2(), config))
    model.save_pretrained(tmp_path / "a")
    found = Adapter.load(tmp_path / "a")
    for path, layer in lora_layers(model).items():
        delta = layer.get_delta_weight("default")
        assert delta.shape == layer.get_base_layer().weight.shape
        torch.testing.assert_close(found.modules[path].dense().T, delta, rtol=1e-5, atol=1e-6)
    assert found.transposed == set(found.modules)


def test_named_adapters_in_the_weights_are_read(tmp_path):
    """PEFT's state dicts say lora_A.default.weight; some tools save them as they are."""
    adapter = simple()
    adapter.save(tmp_path / "a")
    (tmp_path / "a" / SIDECAR).unlink()
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({k.replace(".weight", ".default.weight"): t for k, t in tensors.items()}, tmp_path / "a" / WEIGHTS)
    assert Adapter.load(tmp_path / "a").digest == adapter.digest


class TestDamage:
    """Every damage is an AdapterError that names the place; none is another adapter."""

    def test_any_flipped_byte(self, tmp_path):
        adapter = simple()
        adapter.save(tmp_path / "a")
        weights = tmp_path / "a" / WEIGHTS
        good = weights.read_bytes()
        data = 8 + int.from_bytes(good[:8], "little")
        chance = random.Random(0)
        places = [*range(8), *chance.sample(range(8, data), 40), *chance.sample(range(data, len(good)), 40)]
        errors = []
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << chance.randrange(8)
            weights.write_bytes(bad)
            try:
                loaded = Adapter.load(tmp_path / "a")
            except AdapterError as error:
                errors.append(str(error))
            else:
                assert place < data, "a changed number is always found"
                assert loaded.digest == adapter.digest
        assert len(errors) >= 60
        assert all(str(tmp_path / "a") in error for error in errors)

    def test_a_flipped_bit_of_a_number_is_said_to_be_a_change(self, tmp_path):
        simple().save(tmp_path / "a")
        weights = tmp_path / "a" / WEIGHTS
        bad = bytearray(weights.read_bytes())
        bad[-4] ^= 1
        weights.write_bytes(bad)
        with pytest.raises(AdapterError, match=r"changed or damaged; fetch it again, or delete lorchestra\.json"):
            Adapter.load(tmp_path / "a")

    def test_numbers_of_an_unknown_kind(self, tmp_path):
        simple().save(tmp_path / "a")
        weights = tmp_path / "a" / WEIGHTS
        good = weights.read_bytes()
        end = 8 + int.from_bytes(good[:8], "little")
        for kind, bits in (("F8_E8M0", 8), ("F4", 4)):
            fields = json.loads(good[8:end])
            first = next(name for name in fields if name != "__metadata__")
            begin, stop = fields[first]["data_offsets"]
            fields[first] |= {"dtype": kind, "shape": [(stop - begin) * 8 // bits]}
            text = json.dumps(fields).encode()
            weights.write_bytes(len(text).to_bytes(8, "little") + text + good[end:])
            with pytest.raises(AdapterError, match=f"numbers of a kind '{kind}'"):
                Adapter.load(tmp_path / "a")

    def test_truncated_at_any_length(self, tmp_path):
        simple().save(tmp_path / "a")
        weights = tmp_path / "a" / WEIGHTS
        good = weights.read_bytes()
        for length in [0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1]:
            weights.write_bytes(good[:length])
            with pytest.raises(AdapterError, match="damaged or not a safetensors file"):
                Adapter.load(tmp_path / "a")

    @pytest.mark.parametrize(
        ("key", "value"), [("lora_alpha", 16), ("use_rslora", True), ("alpha_pattern", {"q_proj": 1})]
    )
    def test_a_changed_scale(self, tmp_path, key, value):
        simple().save(tmp_path / "a")
        change(tmp_path / "a" / CONFIG, {key: value})
        with pytest.raises(AdapterError, match="changed or damaged"):
            Adapter.load(tmp_path / "a")

    @pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
    def test_a_missing_half(self, tmp_path, lost):
        directory = foreign(tmp_path, lambda t: t.pop(next(k for k in t if "layers.1.self_attn" in k and lost in k)))
        with pytest.raises(AdapterError, match=r"holds only lora_[AB] of 'model\.layers\.1\.self_attn\.q_proj'"):
            Adapter.load(directory)

    def test_whole_weights_that_would_be_lost(self, tmp_path):
        prefix = "base_model.model.model."
        key = prefix + "norm.base_layer.weight"
        with pytest.raises(AdapterError, match=r"whole weight of 'model\.norm', which would be lost: merge it"):
            Adapter.load(foreign(tmp_path, lambda t: t.update({key: torch.ones(32)})))
        key = prefix + "layers.0.self_attn.q_proj.base_layer.weight"
        with pytest.raises(AdapterError, match=r"weight of shape \(5, 32\) .* factors change one of shape \(32, 32\)"):
            Adapter.load(foreign(tmp_path, lambda t: t.update({key: torch.ones(5, 32)})))
        found = Adapter.load(foreign(tmp_path, lambda t: t.update({key: torch.ones(32, 32)})))
        assert found.digest == simple().digest

    def test_whole_numbers(self, tmp_path):
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        with pytest.raises(AdapterError, match=r"as torch\.int8; factors must be floating-point"):
            Adapter.load(foreign(tmp_path, lambda t: t.update({key: torch.ones(3, 32, dtype=torch.int8)})))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, tmp_path, bad):
        directory = foreign(tmp_path, lambda t: t[next(iter(t))].view(-1)[3:4].fill_(bad))
        with pytest.raises(AdapterError, match=f"{directory}: adapter module '.*' holds NaN or infinity"):
            Adapter.load(directory)

    def test_shapes_that_do_not_fit(self, tmp_path):
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        directory = foreign(tmp_path, lambda t: t.update({key: torch.ones(5, 32)}))
        with pytest.raises(
            AdapterError, match=r"module 'model\.layers\.0\.self_attn\.q_proj': low-rank factors must be"
        ):
            Adapter.load(directory)
        directory = foreign(tmp_path, lambda t: t.update({key: torch.ones(())}))
        with pytest.raises(AdapterError, match="low-rank factors must be"):
            Adapter.load(directory)

    def test_twice(self, tmp_path):
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A."
        directory = foreign(tmp_path, lambda t: t.update({key + "other.weight": t[key + "weight"].clone()}))
        with pytest.raises(AdapterError, match="twice, under two adapter names"):
            Adapter.load(directory)

    def test_no_factors(self, tmp_path):
        with pytest.raises(AdapterError, match="holds no lora_A and lora_B"):
            Adapter.load(foreign(tmp_path, lambda t: t.clear()))

    @pytest.mark.parametrize(
        ("text", "message"),
        [("", "cannot be read"), ("[1]", "should hold a JSON object"), ("{" * 3, "cannot be read"),
         ('{"a":' * 99_999, "cannot be read"), ("\xff", "cannot be read")],
    )  # fmt: skip
    @pytest.mark.parametrize("name", [CONFIG, SIDECAR])
    def test_json(self, tmp_path, name, text, message):
        simple().save(tmp_path / "a")
        (tmp_path / "a" / name).write_text(text, encoding="latin-1")
        with pytest.raises(AdapterError, match=f"{name} {message}"):
            Adapter.load(tmp_path / "a")

    @pytest.mark.parametrize(
        "changes",
        [{"digest": None}, {"base": None}, {"lineage": ["abc"]}, {"lineage": {}}, {"base": {"colour": "blue"}},
         {"transposed": 7}, {"schema": 2}],
    )  # fmt: skip
    def test_sidecar(self, tmp_path, changes):
        simple().save(tmp_path / "a")
        change(tmp_path / "a" / SIDECAR, changes)
        with pytest.raises(AdapterError, match=r"lorchestra\.json"):
            Adapter.load(tmp_path / "a")


def foreign(tmp_path, tamper):
    """An adapter directory without our sidecar, its tensors tampered with."""
    directory = tmp_path / "foreign"
    simple().save(directory)
    (directory / SIDECAR).unlink(missing_ok=True)
    tensors = load_file(directory / WEIGHTS)
    tamper(tensors)
    save_file(tensors, directory / WEIGHTS)
    return directory


def change(path, changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestStorage:
    def test_an_adapter_is_replaced_whole(self, tmp_path):
        simple(1).save(tmp_path / "a")
        simple(2).save(tmp_path / "a")
        assert Adapter.load(tmp_path / "a").digest == simple(2).digest

    def test_nothing_but_an_adapter_is_replaced(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "thesis.tex").write_text("mine")
        with pytest.raises(StorageError, match="not empty; choose another directory"):
            simple().save(tmp_path / "a")
        (tmp_path / "b").write_text("mine")
        with pytest.raises(StorageError, match="a file is there"):
            simple().save(tmp_path / "b")
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "thesis.tex"]

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.999])
    def test_no_room(self, tmp_path, share):
        """Writing stops in the middle of a file: the adapter that was there is still there, and nothing beside it."""
        simple(1).save(tmp_path / "a")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * (tmp_path / "a" / WEIGHTS).stat().st_size), hard))
        try:
            for name in ("a", "b"):
                with pytest.raises(StorageError, match=f"cannot write the adapter to .*{name}: "):
                    simple(2).save(tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert Adapter.load(tmp_path / "a").digest == simple(1).digest

    def test_what_overflows_is_not_written(self, tmp_path):
        with pytest.raises(AdapterError, match="infinity"):
            (simple() * 1e9).save(tmp_path / "a", dtype=torch.float16)
        assert list(tmp_path.iterdir()) == []
