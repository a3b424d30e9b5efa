"""What ``benchmarks/gate.py`` measures on: a base, an adapter a domain, prompts of a split; real ones or tiny ones."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import tiny_base

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class One:
    """A prompt with its answer, rendered.

    Args:
        domain: it belongs to.
        text: of the prompt, for people and for naive Bayes.
        item: prompt and answer as token ids.
        group: of the split.
        known_as: in the ledger of sealed tests.
    """

    domain: str
    text: str
    item: Any
    group: str
    known_as: str = ""

    @property
    def example(self) -> Any:
        """As a gate learns from it."""
        from lorchestra.gate import GateExample

        return GateExample(self.item, self.domain, "sft", 0, self.text)


@dataclass(frozen=True)
class Case:
    """What is measured on.

    Args:
        base: loaded.
        members: domain → its adapter.
        parts: of the split → prompts of all domains.
        plain: renders a plain prompt as token ids.
    """

    base: Any
    members: Mapping[str, Any]
    parts: Mapping[str, Sequence[One]]
    plain: Mapping[str, Sequence[int]]

    def prompts(self, part: str) -> list[One]:
        """All of a part."""
        return list(self.parts[part])

    def first(self, part: str, limit: int) -> list[One]:
        """The first of each domain."""
        return [one for name in self.members for one in self._of(part, name)[:limit]]

    def drawn(self, limit: int) -> list[One]:
        """Training prompts, so many of each domain, drawn once for all."""
        found = []
        for name in self.members:
            mine = self._of("train", name)
            found += random.Random(0).sample(mine, min(limit, len(mine)))
        return found

    def domains(self, part: str, limit: int) -> dict[str, Any]:
        """As the search scores them."""
        from lorchestra.evaluate.score import Domain

        out = {}
        for name in self.members:
            mine = self._of(part, name)[:limit]
            items, groups = tuple(one.item for one in mine), tuple(one.group for one in mine)
            out[name] = Domain(name, "sft", items, (0,) * len(items), groups)
        return out

    def held(self, limit: int) -> dict[str, Any]:
        """The sealed test, as a gate is judged on it."""
        from lorchestra.pipeline.gate_alone import Held

        out = {}
        for name, domain in self.domains("test", limit).items():
            mine = self._of("test", name)[:limit]
            out[name] = Held(domain, tuple(one.text for one in mine), frozenset(), tuple(one.known_as for one in mine))
        return out

    @contextmanager
    def mounted(self) -> Iterator[Any]:
        """A bank with all members."""
        from lorchestra.pipeline.choosing import mounted

        bank = mounted(self.base, self.members)
        try:
            yield bank
        finally:
            bank.unmount()

    @property
    def layer_count(self) -> int:
        """L."""
        return int(self.base.model.config.num_hidden_layers)

    def layers(self, wanted: Sequence[int]) -> list[int]:
        """Those that the base has."""
        return [layers for layers in wanted if layers < self.layer_count]

    def background(self, layers: int) -> Any:
        """What the base makes of plain prompts."""
        from lorchestra.gate.background import Background
        from lorchestra.gate.features import FeatureSpec, features

        x = features(self.base.model, list(self.plain.values()), FeatureSpec(layers))
        norm = self.base.model.model.layers[layers].input_layernorm.weight.detach().float()
        return Background(x, norm)

    def long_prompt(self, length: int) -> list[int]:
        """Prompts of the test one after another, to ``length`` tokens."""
        ids = [token for one in self.parts["test"] for token in one.item.prompt]
        return (ids * (length // len(ids) + 1))[:length]

    def _of(self, part: str, name: str) -> list[One]:
        return [one for one in self.parts[part] if one.domain == name]


def naive_bayes(train: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[str]:
    """Multinomial, on words in lower case, one added to every count.

    Args:
        train: text and its class.
        texts: to classify.
    """

    def words(text: str) -> list[str]:
        return re.findall(r"[\w']+", text.lower())

    counts: dict[str, Counter[str]] = {}
    for text, name in train:
        counts.setdefault(name, Counter()).update(words(text))
    priors = Counter(name for _, name in train)
    known = len(set().union(*counts.values()))
    totals = {name: sum(found.values()) + known for name, found in counts.items()}

    def best(text: str) -> str:
        def likely(name: str) -> float:
            said = sum(math.log((counts[name][word] + 1) / totals[name]) for word in words(text))
            return math.log(priors[name]) + said

        return max(counts, key=likely)

    return [best(text) for text in texts]


def real(asked: argparse.Namespace) -> Case:
    """The recipe's base and data, and the adapters of a finished run."""
    from lorchestra.adapter.adapter import Adapter
    from lorchestra.base.home import home
    from lorchestra.base.load import load_base
    from lorchestra.evaluate.ledger import item_digest
    from lorchestra.gate.background import PROMPTS
    from lorchestra.pipeline.prepare import prepare
    from lorchestra.recipe.recipe import Recipe

    recipe = Recipe.load(asked.recipe)
    prepared = prepare(recipe)
    if asked.adapter:
        places = {name: Path(place) for name, _, place in (text.partition("=") for text in asked.adapter)}
    else:
        steps = json.loads((asked.run / "plan.json").read_text(encoding="utf-8"))["steps"]
        found = {step["name"]: step["digest"] for step in steps if step["kind"] == "stage"}
        places = {
            stage.name: home() / "steps" / f"stage-{found[stage.name][:24]}" / "adapter" for stage in recipe.stages
        }
    parts: dict[str, list[One]] = {part: [] for part in PARTS}
    for stage in recipe.stages:
        data = prepared.data[stage.name]
        for part, examples in data.splits.parts():
            for example, item in zip(examples, data.rendered[part], strict=True):
                parts[part].append(One(stage.name, example.asked, item, example.group, item_digest(example)))
    plain = {
        text: prepared.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in PROMPTS
    }
    base = load_base(prepared.directory, name=prepared.base.name, dtype=asked.dtype)
    return Case(base, {name: Adapter.load(place) for name, place in places.items()}, parts, plain)


WORDS = 40  # of a domain's own vocabulary, in the tiny case


def tiny(scratch: Path) -> Case:
    """A random Llama of three layers, random adapters, and domains with words of their own."""
    import torch

    from lorchestra import Adapter, LowRank
    from lorchestra.base.load import load_base
    from lorchestra.data.render import Branch, Rendered

    model = tiny_base(scratch / "base", 3)
    base = load_base(scratch / "base", device="cpu", dtype="float32")
    linears = {p: m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in p}
    draw = random.Random(0)
    members, parts = {}, {part: list[One]() for part in PARTS}
    for place, name in enumerate(("one", "two", "three", "four")):
        members[name] = Adapter(
            {
                path: LowRank(torch.randn(m.out_features, 4) * 0.1, torch.randn(4, m.in_features) * 0.1)
                for path, m in linears.items()
            },
            base.id,
        )
        mine = range(4 + place * WORDS, 4 + (place + 1) * WORDS)
        for part in PARTS:
            for number in range(12):
                ids = tuple(draw.choices(mine, k=14))
                text = " ".join(f"t{i}" for i in ids[:8])
                item = Rendered(ids[:8], (Branch(ids[8:], (True,) * 6),), 0)
                parts[part].append(One(name, text, item, f"{part} {name} {number}"))
    plain = {str(k): draw.choices(range(200, 260), k=8) for k in range(8)}
    return Case(base, members, parts, plain)
