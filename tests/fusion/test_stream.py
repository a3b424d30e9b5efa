"""The streamed merge against one in memory, and against the model with its adapter."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import make_tiny_model, make_tiny_tokenizer

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import BaseId, Lineage
from lorchestra.adapter.lowrank import LowRank
from lorchestra.bank import Bank, linear_shape
from lorchestra.errors import AdapterError, SourceError, StorageError
from lorchestra.fusion.stream import merge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDS = torch.randint(4, 48, (2, 9), generator=torch.Generator().manual_seed(0))


def make_gpt2(**overrides):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    settings = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
    config = GPT2Config(**settings, eos_token_id=1, initializer_range=0.15, **overrides)
    return GPT2LMHeadModel(config).float().eval().requires_grad_(False)


def adapter_for(model, seed=0, only="", scale=0.1):
    """Rank 3 in every linear module whose path contains ``only``, but the head."""
    generator = torch.Generator().manual_seed(seed)
    modules, transposed = {}, set()
    for path, module in model.named_modules():
        shape = linear_shape(module)
        if shape and only in path and (only or "lm_head" not in path):
            m, n = shape
            B = torch.randn(m, 3, generator=generator) * scale
            modules[path] = LowRank(B, torch.randn(3, n, generator=generator) * scale)
            if type(module).__name__ == "Conv1D":
                transposed.add(path)
    return Adapter(modules, BaseId("tiny"), Lineage(name="a"), frozenset(transposed))


def embedding_adapter(path, seed=0, vocabulary=260, hidden=32):
    """ΔW of an embedding is [hidden, vocabulary] and stored as its transpose; the head's is [vocabulary, hidden]."""
    generator = torch.Generator().manual_seed(seed)
    wide, narrow = (torch.randn(size, 3, generator=generator) * 0.2 for size in (vocabulary, hidden))
    if path.endswith("lm_head"):
        return Adapter({path: LowRank(wide, narrow.T)})
    return Adapter({path: LowRank(narrow, wide.T)}, transposed=frozenset({path}))


def tensors(directory):
    return {name: t for shard in directory.glob("*.safetensors") for name, t in load_file(shard).items()}


def saved(model, directory, **kwargs):
    model.save_pretrained(directory, **kwargs)
    return directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def in_memory(weights, adapter, dtype=None):
    """The oracle: float32 add, round once to ``dtype`` (by default each tensor's own)."""
    merged = {}
    for name, weight in weights.items():
        kind = (dtype or weight.dtype) if weight.is_floating_point() else weight.dtype
        path = name.removesuffix(".weight")
        if path in adapter.modules:
            delta = adapter.modules[path].B @ adapter.modules[path].A
            weight = weight.float() + (delta.T if path in adapter.transposed else delta)
        merged[name] = weight.to(kind)
    return merged


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", ["auto", *DTYPES])
def test_streamed_is_in_memory_bit_for_bit(stored, dtype, tmp_path):
    base = saved(make_tiny_model().to(DTYPES[stored]), tmp_path / "base")
    adapter = adapter_for(make_tiny_model())
    report = merge(base, adapter, tmp_path / "out", dtype=dtype)
    assert_same(tensors(tmp_path / "out"), in_memory(tensors(base), adapter, DTYPES.get(dtype)))
    assert report.dtype == (stored if dtype == "auto" else dtype)
    assert report.modules == len(adapter.modules)


def test_sharded_with_an_index(tmp_path):
    model = make_tiny_model(tie_word_embeddings=False)
    base = saved(model, tmp_path / "base", max_shard_size="20KB")
    adapter = adapter_for(model)
    merge(base, adapter, tmp_path / "out", dtype="bfloat16")
    shards = [name for name in names(base) if name.endswith(".safetensors")]
    assert len(shards) > 3
    assert [name for name in names(tmp_path / "out") if name.endswith(".safetensors")] == shards
    assert_same(tensors(tmp_path / "out"), in_memory(tensors(base), adapter, torch.bfloat16))
    before, after = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (base, tmp_path / "out"))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]
    merge(base, adapter, tmp_path / "same")
    assert parity(tmp_path / "same", model, adapter) < 1e-4


def parity(directory, model, adapter):
    """Share of the adapter's effect on the logits that differs in the merged directory, loaded by transformers."""
    from transformers import AutoModelForCausalLM

    merged, how = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not how["missing_keys"]
    assert not how["unexpected_keys"]
    bank = Bank(model)
    bank.load("a", adapter)
    with torch.no_grad():
        base, found = model(input_ids=IDS).logits, merged(input_ids=IDS).logits
        with bank.using({"a": 1.0}):
            expected = model(input_ids=IDS).logits
    effect = (expected - base).norm()
    assert effect > 0.02 * base.norm(), "the law must not be vacuous"
    return float((found - expected).norm() / effect)


@pytest.mark.parametrize("tied", [True, False])
def test_the_result_answers_as_base_and_adapter(tied, tmp_path):
    model = make_tiny_model(tie_word_embeddings=tied)
    base = saved(model, tmp_path / "base")
    adapter = adapter_for(model)
    merge(base, adapter, tmp_path / "out")
    assert parity(tmp_path / "out", model, adapter) < 1e-4


def test_conv1d_weights_take_the_transpose(tmp_path):
    """Square modules too, where a wrong orientation would fit."""
    model = make_gpt2()
    base = saved(model, tmp_path / "base")
    adapter = adapter_for(model)
    assert any(u.shape == (16, 16) for u in adapter.modules.values())
    adapter.save(tmp_path / "a")
    merge(base, Adapter.load(tmp_path / "a"), tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), in_memory(tensors(base), adapter))
    assert parity(tmp_path / "out", model, adapter) < 1e-4


def test_files_without_the_models_prefix(tmp_path):
    """GPT-2's own files say h.0…, the modules are called transformer.h.0…."""
    model = make_gpt2()
    base = saved(model, tmp_path / "base")
    bare = {k.removeprefix("transformer."): t for k, t in load_file(base / "model.safetensors").items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_for(model)
    merge(base, adapter, tmp_path / "out")
    assert parity(tmp_path / "out", model, adapter) < 1e-4


def test_an_untied_head_is_merged(tmp_path):
    model = make_tiny_model(tie_word_embeddings=False)
    base = saved(model, tmp_path / "base")
    adapter = adapter_for(model, only="lm_head")
    merge(base, adapter, tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), in_memory(tensors(base), adapter))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_report_against_numpy(dtype, stored, tmp_path):
    """Norms, what rounding lost (of an entry at most itself), the entries without a trace, the worst module."""
    base = saved(make_tiny_model().to(DTYPES[stored]), tmp_path / "base")
    adapter = adapter_for(make_tiny_model(), scale=0.01)
    report = merge(base, adapter, tmp_path / "out", dtype=dtype)
    before, after = tensors(base), tensors(tmp_path / "out")
    rows = {}
    for path, module in adapter.modules.items():
        stored_weight = before[f"{path}.weight"]
        three = (stored_weight, after[f"{path}.weight"], stored_weight.to(DTYPES[dtype]))
        W, M, R = (tensor.double().numpy() for tensor in three)
        D = module.B.double().numpy() @ module.A.double().numpy()
        lost = np.minimum(np.abs(M - R - D), np.abs(D))
        rows[path] = [np.sum(x**2) for x in (W, D, lost, R - W)] + [D.size, np.count_nonzero(M != R)]
    weight, update, lost, moved, entries, changed = np.sum(list(rows.values()), axis=0)
    assert report.update_ratio == pytest.approx(np.sqrt(update / weight), rel=1e-5)
    assert report.rounding_lost == pytest.approx(np.sqrt(lost / update), rel=1e-3)
    assert report.entries_lost == pytest.approx(1 - changed / entries, abs=1e-9)
    assert report.base_rounding == pytest.approx(np.sqrt(moved / weight), rel=1e-5)
    worst = max(rows, key=lambda path: rows[path][2] / rows[path][1])
    assert report.worst["module"] == worst
    assert report.worst["rounding_lost"] == pytest.approx(np.sqrt(rows[worst][2] / rows[worst][1]), rel=1e-3)
    assert report.worst["entries_lost"] == pytest.approx(1 - rows[worst][5] / rows[worst][4], abs=1e-9)
    assert report.as_dict() == asdict(report)
    low, high = {"float32": (0, 1e-4), "float16": (1e-3, 0.3), "bfloat16": (0.1, 1.0)}[dtype]
    assert low <= report.rounding_lost <= high
    assert (report.base_rounding > 0) == (dtype != "float32" and dtype != stored)


def test_what_rounding_lost_is_never_more_than_the_update(tmp_path):
    """A float32 base in bfloat16: the base's own rounding, far larger than the update, is told apart."""
    base = saved(make_tiny_model(), tmp_path / "base")
    report = merge(base, adapter_for(make_tiny_model(), scale=1e-4), tmp_path / "out", dtype="bfloat16")
    assert report.base_rounding > 100 * report.update_ratio
    assert 0.9 < report.rounding_lost <= 1
    assert 0.99 < report.entries_lost <= 1
    assert report.worst["rounding_lost"] <= 1


def test_entries_that_the_update_does_not_reach_are_not_counted_as_lost(tmp_path):
    base = saved(make_tiny_model(), tmp_path / "base")
    path, update = next(iter(adapter_for(make_tiny_model()).modules.items()))
    B, A = update.B.clone(), update.A.clone()
    B[3:], A[:, :5] = 0, 0
    report = merge(base, Adapter({path: LowRank(B, A)}), tmp_path / "out")
    assert report.entries_lost == pytest.approx(0, abs=0.02)


def test_configuration_and_note(tmp_path):
    base = saved(make_tiny_model().to(torch.bfloat16), tmp_path / "base")
    adapter = adapter_for(make_tiny_model())
    merge(base, adapter, tmp_path / "auto")
    merge(base, adapter, tmp_path / "wide", dtype="float32")
    config = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "auto" / "config.json").read_text()) == config
    assert json.loads((tmp_path / "wide" / "config.json").read_text()) == {**config, "dtype": "float32"}
    note = json.loads((tmp_path / "wide" / "lorchestra.json").read_text())
    assert (note["made_by"], note["adapter"], note["lineage"]["name"]) == ("merge", adapter.digest, "a")


class TestSharedEmbeddings:
    """One weight, two places: an update of one of them must not reach the other."""

    @pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens"])
    @pytest.mark.parametrize("written_out", [False, True])
    def test_untied_it_answers_as_base_and_adapter(self, tmp_path, path, written_out):
        from transformers import AutoModelForCausalLM

        model = make_tiny_model()
        base = saved(model, tmp_path / "base", max_shard_size="20KB")
        if written_out:
            shard = next(f for f in base.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(f))
            weights = load_file(shard)
            save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, shard)
        adapter = embedding_adapter(path)
        merge(base, adapter, tmp_path / "out", untie=True)
        W = model.get_input_embeddings().weight
        update = adapter.modules[path]
        changed = W + (update.dense() if path == "lm_head" else update.dense().T)
        found = tensors(tmp_path / "out")
        assert torch.equal(found["model.embed_tokens.weight"], W if path == "lm_head" else changed)
        assert torch.equal(found["lm_head.weight"], changed if path == "lm_head" else W)
        merged, how = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not how["missing_keys"]
        assert not how["unexpected_keys"]
        hidden = torch.nn.functional.embedding(IDS, W if path == "lm_head" else changed)
        with torch.no_grad():
            states = model.model(inputs_embeds=hidden).last_hidden_state
            expected = states @ (changed if path == "lm_head" else W).T
            torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(found)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())

    def test_both_at_once(self, tmp_path):
        base = saved(make_tiny_model(), tmp_path / "base")
        one, two = embedding_adapter("lm_head", 1), embedding_adapter("model.embed_tokens", 2)
        merge(base, Adapter({**one.modules, **two.modules}, transposed=two.transposed), tmp_path / "out", untie=True)
        W, found = tensors(base)["model.embed_tokens.weight"], tensors(tmp_path / "out")
        assert torch.equal(found["lm_head.weight"], W + one.modules["lm_head"].dense())
        assert torch.equal(found["model.embed_tokens.weight"], W + two.modules["model.embed_tokens"].dense().T)

    def test_an_embedding_of_its_own(self, tmp_path):
        model = make_tiny_model(tie_word_embeddings=False)
        base = saved(model, tmp_path / "base")
        adapter = embedding_adapter("model.embed_tokens")
        merge(base, adapter, tmp_path / "out")
        assert_same(tensors(tmp_path / "out"), in_memory(tensors(base), adapter))

    def test_gpt2_whose_configuration_does_not_say_that_it_ties(self, tmp_path):
        base = saved(make_gpt2(), tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (base / "config.json").write_text(json.dumps(config))
        adapter = embedding_adapter("transformer.wte", vocabulary=50, hidden=16)
        with pytest.raises(AdapterError, match="--untie"):
            merge(base, adapter, tmp_path / "out")
        merge(base, adapter, tmp_path / "out", untie=True)
        W = tensors(base)["transformer.wte.weight"]
        found = tensors(tmp_path / "out")
        assert torch.equal(found["lm_head.weight"], W)
        assert torch.equal(found["transformer.wte.weight"], W + adapter.modules["transformer.wte"].dense().T)


class TestCompanions:
    @pytest.fixture
    def base(self, tmp_path):
        directory = saved(make_tiny_model(), tmp_path / "base")
        make_tiny_tokenizer().save_pretrained(directory)
        (directory / "lorchestra.json").write_text("{}")
        (directory / "pytorch_model.bin").write_text("pickle")
        (directory / "modeling_evil.py").write_text("raise SystemExit")
        return directory

    def test_the_bases(self, base, tmp_path):
        from transformers import AutoTokenizer

        merge(base, adapter_for(make_tiny_model()), tmp_path / "out")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
        assert not {"pytorch_model.bin", "modeling_evil.py"} & set(names(tmp_path / "out"))
        assert json.loads((tmp_path / "out" / "lorchestra.json").read_text())["made_by"] == "merge"
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == make_tiny_tokenizer().chat_template

    def test_the_training_runs(self, base, tmp_path):
        """Its tokenizer and template, whole: no file of the base's tokenizer beside them, nothing else of its files."""
        from transformers import AutoTokenizer

        (base / "added_tokens.json").write_text("{}")
        trained = tmp_path / "trained"
        tokenizer = make_tiny_tokenizer()
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        tokenizer.save_pretrained(trained)
        (trained / "generation_config.json").write_text('{"temperature": 9}')
        (trained / "training.json").write_text("{}")
        merge(base, adapter_for(make_tiny_model()), tmp_path / "out", tokenizer_from=trained)
        found = names(tmp_path / "out")
        assert not {"training.json", "added_tokens.json"} & set(found)
        assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
            base / "generation_config.json"
        ).read_bytes()
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template

    def test_no_tokenizer_there(self, base, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(SourceError, match="empty holds no tokenizer"):
            merge(base, adapter_for(make_tiny_model()), tmp_path / "out", tokenizer_from=tmp_path / "empty")
        assert not (tmp_path / "out").exists()


class TestRefusals:
    """Everything is checked before anything is written."""

    @pytest.fixture
    def base(self, tmp_path):
        return saved(make_tiny_model(), tmp_path / "base")

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path, base):
        yield
        assert not (tmp_path / "out").exists()
        assert [name for name in names(tmp_path) if name.startswith(".")] == []

    def test_another_bases_shapes(self, base, tmp_path):
        wide = make_tiny_model(hidden_size=64, intermediate_size=96)
        with pytest.raises(AdapterError, match=r"module '.*' changes a weight of shape \(\d+, \d+\); the base's is"):
            merge(base, adapter_for(wide), tmp_path / "out")

    def test_another_bases_modules(self, base, tmp_path):
        deep = make_tiny_model(num_hidden_layers=4)
        with pytest.raises(AdapterError, match=r"no weight for module 'model\.layers\.2\..*a similar one is 'model"):
            merge(base, adapter_for(deep), tmp_path / "out")

    def test_a_wrong_orientation(self, base, tmp_path):
        adapter = adapter_for(make_tiny_model(), only="up_proj")
        with pytest.raises(AdapterError, match=r"shape \(32, 48\); the base's is \(48, 32\)"):
            merge(base, Adapter(adapter.modules, transposed=frozenset(adapter.modules)), tmp_path / "out")

    @pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens"])
    @pytest.mark.parametrize("written_out", [False, True])
    def test_a_shared_embedding(self, base, tmp_path, written_out, path):
        if written_out:
            weights = tensors(base)
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
            save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=rf"changes '{path}', whose weight .* share in this base.*--untie"):
            merge(base, embedding_adapter(path), tmp_path / "out")

    def test_two_modules_for_one_weight(self, base, tmp_path):
        adapter = adapter_for(make_tiny_model(), only="layers.0.self_attn.q_proj")
        (path,) = adapter.modules
        both = Adapter({path: adapter.modules[path], path.removeprefix("model."): adapter.modules[path]})
        with pytest.raises(AdapterError, match="would both change"):
            merge(base, both, tmp_path / "out")

    def test_a_quantised_base(self, base, tmp_path):
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
        with pytest.raises(SourceError, match=r"is quantised \(gptq\).*--dequantise"):
            merge(base, adapter_for(make_tiny_model()), tmp_path / "out")

    def test_tensors_of_a_strange_type(self, base, tmp_path):
        weights = tensors(base)
        weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
        save_file(weights, base / "model.safetensors")
        with pytest.raises(SourceError, match=r"'model\.norm\.weight' of the base is of type F8_E4M3"):
            merge(base, adapter_for(make_tiny_model()), tmp_path / "out")

    def test_damaged_bases(self, base, tmp_path):
        adapter = adapter_for(make_tiny_model())
        good = (base / "model.safetensors").read_bytes()
        (base / "model.safetensors").write_bytes(good[:-7])
        with pytest.raises(SourceError, match="not a safetensors file, or is damaged"):
            merge(base, adapter, tmp_path / "out")
        (base / "model.safetensors").unlink()
        with pytest.raises(SourceError, match=r"holds no .*safetensors"):
            merge(base, adapter, tmp_path / "out")
        (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-1.safetensors"}}')
        with pytest.raises(SourceError, match=r"incomplete: .*model-1\.safetensors"):
            merge(base, adapter, tmp_path / "out")
        (base / "config.json").write_text("{")
        with pytest.raises(SourceError, match=r"config\.json is damaged"):
            merge(base, adapter, tmp_path / "out")
        (base / "config.json").unlink()
        with pytest.raises(SourceError, match=r"no config\.json, so it is not a model directory"):
            merge(base, adapter, tmp_path / "out")

    def test_an_unknown_dtype(self, base, tmp_path):
        with pytest.raises(SourceError, match="dtype 'int4' is unknown; there are auto, float32"):
            merge(base, adapter_for(make_tiny_model()), tmp_path / "out", dtype="int4")

    def test_no_room(self, base, tmp_path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(StorageError, match="cannot write the merged model to"):
                merge(base, adapter_for(make_tiny_model()), tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_taken_place_is_left_alone(tmp_path):
    base = saved(make_tiny_model(), tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    adapter = adapter_for(make_tiny_model())
    with pytest.raises(StorageError, match="it is not empty"):
        merge(base, adapter, base)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="a file is there"):
        merge(base, adapter, tmp_path / "file")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_files_that_transformers_would_not_read_are_left_out(tmp_path):
    """A second copy of the weights under another name, as some models ship it, would stay the bare base."""
    base = saved(make_tiny_model(), tmp_path / "base")
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, base / "consolidated.safetensors")
    merge(base, adapter_for(make_tiny_model()), tmp_path / "out")
    assert "consolidated.safetensors" not in names(tmp_path / "out")


MEASURED = """
import json, resource, sys
from lorchestra import Adapter, LowRank, merge

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

adapter = Adapter.load("adapter")
merge("small", Adapter({p: LowRank(u.B[:12], u.A) for p, u in adapter.modules.items()}), "warm")
before = peak()
merge("base", adapter, "out", dtype=sys.argv[1])
print(json.dumps([before, peak()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_a_merge_takes_less_memory_than_its_largest_tensor(tmp_path, dtype):
    """Resident memory of a process of its own, beyond what imports, adapter and a first small merge take."""
    noise = torch.Generator().manual_seed(0)
    largest = torch.randn(12_000, 4096, generator=noise).bfloat16()
    for name, rows in (("small", 12), ("base", 12_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        weights = {f"layers.{i}.weight": largest[:rows].clone() for i in range(4)}
        save_file(weights, tmp_path / name / "model.safetensors")
    update = LowRank(torch.randn(12_000, 8, generator=noise) * 0.01, torch.randn(8, 4096, generator=noise))
    Adapter({f"layers.{i}": LowRank(update.B.clone(), update.A.clone()) for i in (1, 2)}).save(tmp_path / "adapter")
    done = subprocess.run([sys.executable, "-c", MEASURED, dtype], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert after - before < largest.nbytes, (
        f"{(after - before) / 1e6:.0f} MB beside tensors of {largest.nbytes / 1e6:.0f}"
    )
