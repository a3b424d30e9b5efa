"""The search on a real (tiny) model: known minima, layer groups, resumption to the same bits."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lowrank import LowRank
from lorchestra.base.load import load_base
from lorchestra.data.render import Branch, Rendered
from lorchestra.errors import Interrupted
from lorchestra.evaluate.goal import Goal
from lorchestra.evaluate.metrics import loss_ratios
from lorchestra.evaluate.score import Domain
from lorchestra.fusion.search import STRATEGIES, weights_key
from lorchestra.pipeline import searching
from lorchestra.pipeline.cache import SCRATCH
from lorchestra.pipeline.searching import Searched, SearchPlan, parts_of, search_weights

ROOT = Path(__file__).parents[2]


def direction(model, seed, only=("q_proj", "down_proj"), scale=0.12):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, module in model.named_modules():
        if path.endswith(only):
            m, n = module.weight.shape
            A = torch.randn(2, n, generator=generator) * scale
            modules[path] = LowRank(torch.randn(m, 2, generator=generator) * scale, A)
    return Adapter(modules)


@pytest.fixture(scope="module")
def base(tiny_dir):
    return load_base(tiny_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def members(base):
    return {f"m{k}": direction(base.model, k) for k in range(3)}


@torch.no_grad()
def add(model, adapters):
    """The oracle's way: ΔW formed densely, added to the weights."""
    for adapter, weight in adapters:
        for path, update in adapter.modules.items():
            model.get_submodule(path).weight += weight * update.dense()


@torch.no_grad()
def written_by(base, adapters, count, seed):
    """Items whose answers are the likeliest under base + Σ adapters: there the loss has its minimum, nearly."""
    model = copy.deepcopy(base.model)
    add(model, adapters)
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        ids = torch.randint(4, 260, (1, 6), generator=generator)
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        tokens = ids[0].tolist()
        items.append(Rendered(tuple(tokens[:6]), (Branch(tuple(tokens[6:]), (True,) * 5),), 0))
    return items


def domain(name, items, kind="sft"):
    return Domain(name, kind, tuple(items), (0,) * len(items), tuple(f"{name}{i}" for i in range(len(items))))


@pytest.fixture(scope="module")
def domains(base, members):
    notes = written_by(base, [(members["m0"], 1.0), (members["m1"], 0.6)], 10, 0)
    pairs = []
    for good, bad in zip(
        written_by(base, [(members["m1"], 1.0)], 6, 1), written_by(base, [(members["m2"], 1.0)], 6, 2), strict=True
    ):
        pairs.append(Rendered(good.prompt, (*good.branches, *bad.branches), 0))
    return {"notes": domain("notes", notes), "pairs": domain("pairs", pairs, "dpo")}


BETAS = {"pairs": 0.1}


def found_by(base, members, domains, work, **plan):
    return search_weights(base, members, domains, BETAS, SearchPlan(**plan), work)


class TestMinimum:
    @pytest.mark.parametrize("strategy", ["gradient", "surrogate"])
    def test_is_where_it_must_be(self, base, tmp_path, strategy):
        """Next tokens with the frequencies that base + 0.8·a + 0.5·b gives them: no λ has a lower loss (Gibbs)."""
        model = copy.deepcopy(base.model)
        model.get_input_embeddings().weight.mul_(5.0)  # so that few tokens have all the probability; tied to the head
        peaked = replace(base, model=model)
        two = {"a": direction(model, 10, scale=0.25), "b": direction(model, 11, scale=0.25)}
        truth = copy.deepcopy(model)
        add(truth, [(two["a"], 0.8), (two["b"], 0.5)])
        items = []
        for prompt in ((10, 20), (30, 40), (50, 60), (70, 80), (90, 100)):
            with torch.no_grad():
                shares = truth(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
            counts = (shares * 200).round().int().tolist()
            items += [Rendered(prompt, (Branch((v,), (True,)),), 0) for v, n in enumerate(counts) for _ in range(n)]
        only = {"tokens": domain("tokens", items)}
        found = found_by(peaked, two, only, tmp_path, strategy=strategy, budget=60)
        best = min(found.candidates, key=lambda c: c.score)
        assert best.origin == strategy
        assert tuple(best.weights.values()) == pytest.approx((0.8, 0.5), abs=0.04)
        assert best.score < 0.95, "the adapters must matter, or any λ would do"

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_every_strategy_reaches_the_best_fixed_point(self, base, members, domains, tmp_path, strategy):
        budget = None if strategy == "grid" else 14
        found = found_by(base, members, domains, tmp_path, strategy=strategy, budget=budget, step=0.25)
        fixed = [c.score for c in found.candidates if c.origin in ("single", "uniform", "base")]
        assert len(fixed) == 5
        assert min(c.score for c in found.candidates) <= min(fixed)

    def test_scores_are_those_of_the_candidates(self, base, members, domains, tmp_path):
        goal = Goal("weighted", {"notes": 3.0, "pairs": 1.0})
        found = found_by(base, members, domains, tmp_path, strategy="heuristics", goal=goal)
        for candidate, scores in zip(found.candidates, found.scores, strict=True):
            ratios = loss_ratios(scores, found.reference, BETAS)
            assert candidate.score == pytest.approx((3 * ratios["notes"] + ratios["pairs"]) / 4)
        zero = next(c for c in found.candidates if c.origin == "base")
        assert zero.score == pytest.approx(1.0)
        assert Searched.from_dict(json.loads(json.dumps(found.as_dict()))) == found

    def test_a_limit_keeps_the_search_out_of_what_crosses_it(self, base, members, domains, tmp_path):
        free = found_by(base, members, domains, tmp_path / "free", goal=Goal(), budget=40)
        tight = found_by(base, members, domains, tmp_path / "tight", goal=Goal(tolerance=0.0), budget=40)

        def crossing(found):
            ratios = [loss_ratios(scores, found.reference, BETAS) for scores in found.scores]
            singles = [r for r, c in zip(ratios, found.candidates, strict=True) if c.origin == "single"]
            best = min(range(len(ratios)), key=lambda k: found.candidates[k].score)
            return max(ratios[best][name] - min(s[name] for s in singles) for name in ratios[best])

        assert crossing(tight) <= max(crossing(free), 1e-9)


class TestLayerGroups:
    def test_groups_make_up_the_member_and_find_their_own_weights(self, base, domains, tmp_path):
        """Answers written with the first layer's part alone: its λ must end above the other layer's."""
        a = direction(base.model, 10)
        first = Adapter({path: update for path, update in a.modules.items() if ".layers.0." in path})
        only = {"notes": domain("notes", written_by(base, [(first, 1.2)], 16, 4))}
        plan = SearchPlan(layer_groups=2, shrinkage=0.0, budget=80)
        found = search_weights(base, {"a": a}, only, {}, plan, tmp_path)
        parts = parts_of({"a": a}, plan)
        assert list(parts) == ["a:layers.0", "a:layers.1"]
        assert {path for part in parts.values() for path in part.modules} == set(a.modules)
        best = min(found.candidates, key=lambda c: c.score)
        assert best.origin == "layer groups"
        assert best.weights["a:layers.0"] > best.weights["a:layers.1"] + 0.3
        tied = min(c.score for c in found.candidates if c.origin != "layer groups")
        assert best.score < tied
        drawn = search_weights(base, {"a": a}, only, {}, replace(plan, shrinkage=100.0), tmp_path / "drawn")
        for candidate in drawn.candidates:
            assert abs(candidate.weights["a:layers.0"] - candidate.weights["a:layers.1"]) < 0.02


class TestResume:
    @pytest.mark.parametrize("strategy", ["gradient", "surrogate", "tpe", "cmaes"])
    def test_killed_after_any_line_it_ends_with_the_same_bits(self, base, members, domains, tmp_path, strategy):
        plan = {"strategy": strategy, "budget": 17, "seed": 2}
        whole = found_by(base, members, domains, tmp_path / "whole", **plan)
        lines = (tmp_path / "whole" / SCRATCH / searching.KEPT).read_bytes().splitlines(keepends=True)
        assert len(lines) > 3
        for kept in range(len(lines)):
            work = tmp_path / f"killed{kept}"
            (work / SCRATCH).mkdir(parents=True)
            torn = b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2]
            (work / SCRATCH / searching.KEPT).write_bytes(torn)
            assert found_by(base, members, domains, work, **plan) == whole
            assert (work / SCRATCH / searching.KEPT).read_bytes() == b"".join(lines)
            shutil.rmtree(work)

    def test_what_is_kept_is_not_computed_again(self, base, members, domains, tmp_path, monkeypatch):
        first = found_by(base, members, domains, tmp_path, budget=15)

        def never(*_, **__):
            pytest.fail("all scores are known")

        for name in ("score", "score_mixtures", "slope"):
            monkeypatch.setattr(searching, name, never)
        assert found_by(base, members, domains, tmp_path, budget=15) == first

    def test_ctrl_c_says_that_scores_are_kept(self, base, members, domains, tmp_path, monkeypatch):
        asked, inner = [], searching._Validation._measured

        def measured(self, points):
            if asked:
                raise KeyboardInterrupt
            asked.append(points)
            return inner(self, points)

        with monkeypatch.context() as patched:
            patched.setattr(searching._Validation, "_measured", measured)
            with pytest.raises(Interrupted, match="the same command goes on"):
                found_by(base, members, domains, tmp_path, budget=9)
        assert not any(module._forward_hooks for module in base.model.modules())
        whole = found_by(base, members, domains, tmp_path / "whole", budget=9)
        assert found_by(base, members, domains, tmp_path, budget=9) == whole

    @pytest.mark.slow
    def test_kill_9_at_any_moment(self, base, members, domains, tiny_dir, tmp_path):
        whole = found_by(base, members, domains, tmp_path / "whole", budget=30)
        for name, adapter in members.items():
            adapter.save(tmp_path / name)
        program = (
            "import sys, pathlib\n"
            "from lorchestra.adapter.adapter import Adapter\n"
            "from lorchestra.base.load import load_base\n"
            "from lorchestra.pipeline.searching import SearchPlan, search_weights\n"
            "from tests.pipeline.test_searching import BETAS, domain, direction, written_by\n"
            "from lorchestra.data.render import Rendered\n"
            "here = pathlib.Path(sys.argv[1])\n"
            "base = load_base(pathlib.Path(sys.argv[2]), device='cpu', dtype='float32')\n"
            "members = {n: Adapter.load(here / n) for n in ('m0', 'm1', 'm2')}\n"
            "notes = written_by(base, [(members['m0'], 1.0), (members['m1'], 0.6)], 10, 0)\n"
            "good, bad = (written_by(base, [(members[n], 1.0)], 6, s) for n, s in (('m1', 1), ('m2', 2)))\n"
            "pairs = [Rendered(g.prompt, (*g.branches, *b.branches), 0) for g, b in zip(good, bad)]\n"
            "domains = {'notes': domain('notes', notes), 'pairs': domain('pairs', pairs, 'dpo')}\n"
            "print('ready', flush=True)\n"
            "search_weights(base, members, domains, BETAS, SearchPlan(budget=30), here / 'work')\n"
        )
        command = [sys.executable, "-c", program, str(tmp_path), str(tiny_dir)]
        kept = tmp_path / "work" / SCRATCH / searching.KEPT
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
            assert running.stdout.readline() == "ready\n"
            while running.poll() is None and not (kept.exists() and kept.stat().st_size):
                time.sleep(0.01)
            running.send_signal(signal.SIGKILL)
        resumed = found_by(base, members, domains, tmp_path / "work", budget=30)
        assert [c.weights for c in resumed.candidates] == [c.weights for c in whole.candidates]
        assert [c.score for c in resumed.candidates] == [c.score for c in whole.candidates]


class TestManners:
    def test_the_model_is_as_it_was(self, base, members, domains, tmp_path):
        before = {name: value.clone() for name, value in base.model.state_dict().items()}
        found_by(base, members, domains, tmp_path, budget=12)
        assert all(torch.equal(before[name], value) for name, value in base.model.state_dict().items())
        assert not any(module._forward_hooks for module in base.model.modules())
        assert all(p.grad is None and not p.requires_grad for p in base.model.parameters())

    def test_small_domains_share_passes_and_large_ones_do_not(self, base, members, domains, tmp_path, monkeypatch):
        calls = []
        inner = searching.score_mixtures
        monkeypatch.setattr(
            searching,
            "score_mixtures",
            lambda bank, d, points, pad: calls.append(len(points)) or inner(bank, d, points, pad),
        )
        shared = found_by(base, members, domains, tmp_path / "a", strategy="heuristics")
        assert max(calls) == searching.TOGETHER
        monkeypatch.setattr(searching, "SHARED", 0)
        calls.clear()
        alone = found_by(base, members, domains, tmp_path / "b", strategy="heuristics")
        assert calls == []
        assert [c.score for c in alone.candidates] == pytest.approx([c.score for c in shared.candidates], rel=1e-4)
        assert [weights_key(c.weights) for c in alone.candidates] == [weights_key(c.weights) for c in shared.candidates]
