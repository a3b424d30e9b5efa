"""Pictures of the console for its documentation: ``python -m tests.console.pictures docs/images [NAME …]``.

Everything in them is a real server on a real registry; names and numbers are made up, and so is what the model says.
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from tests.console.browser import chromium, enter, tab
from tests.console.world import World, loss
from tests.serve.registry_world import write

from lorchestra.adapter.adapter import Adapter
from lorchestra.adapter.lineage import Lineage, Parent
from lorchestra.registry.canary import rollout
from lorchestra.registry.canary.observations import Tally, observe
from lorchestra.registry.canary.plan import Plan
from lorchestra.registry.registry import Registry
from lorchestra.serve.engine import Chunk, Usage

NAMES = ("triage", "discharge_letters", "radiology_notes", "billing_codes", "pharmacy", "lab_reports", "contracts",
         "support_de", "support_zh", "translation")  # fmt: skip
SAID = {
    "clinic": "Fever for three days in a child of four: see a paediatrician today if it drinks little, is hard to "
    "wake, or breathes fast. Until then fluids, rest, and paracetamol by weight.",
    "other": "A fever that lasts three days is worth a call to your doctor. Drink enough, rest, and note the "
    "temperature morning and evening so that you can tell how it went.",
}


def stock(url: str, place: Path) -> Registry:
    """A clinic's registry."""
    registry = Registry.open(url, create=True, actor="train@gpu-1")
    made = {}
    for k, name in enumerate(("terms", "notes", "dialogue")):
        made[name] = write(place / name, 40 + k)
        registry.push(made[name], name, note=f"stage {name}", tags=["stage"], metrics=loss(1.42 - 0.05 * k))
    members = [Adapter.load(made[name]) for name in made]
    for version, weights in enumerate(((0.5, 0.4, 0.3), (0.45, 0.5, -0.1), (0.3, 0.5, 0.25))):
        parents = tuple(
            Parent(name, adapter.digest, w) for name, adapter, w in zip(made, members, weights, strict=True)
        )
        raw = Adapter.load(write(place / f"raw{version}", 60 + version))
        lineage = Lineage(made_by="fusion", parents=parents, settings={"method": "sum", "rank": 8, "strategy": "cma"},
                          data={"sealed": "sha256:" + "5" * 64, "terms.jsonl": "sha256:" + "9" * 64})  # fmt: skip
        found = Adapter(raw.modules, raw.base, lineage).save(place / f"fused{version}")
        metrics = loss(1.24 - 0.06 * version) | {
            "accuracy": loss(0)["loss"].model_copy(
                update={"value": 0.81 + 0.02 * version, "low": 0.78 + 0.02 * version, "high": 0.84 + 0.02 * version,
                        "better": "higher"}
            )
        }  # fmt: skip
        note = ("first fusion of the three stages", "more of the notes", "notes of 2025, dialogue back in")[version]
        registry.push(found, "clinic", note=note, tags=["dpo", "tuned"] if version else ["tuned"], metrics=metrics)
    for k, name in enumerate(NAMES):
        for version in range(1 + k % 3):
            registry.push(write(place / f"{name}{version}", 100 + 10 * k + version), name, tags=["tuned"],
                          metrics=loss(1.5 - 0.03 * k - 0.02 * version))  # fmt: skip
        registry.promote(f"{name}@v1", why="first")
    registry.promote("clinic@v1", why="first version on the ward")
    registry.promote("clinic@v2", why="lower loss on the sealed test", gates=())
    registry.alias("clinic", "staging", "clinic@v3", "for the ward's own tests")
    registry.revoke("pharmacy@v2", "answers doses without units")
    return registry


def busy(world: World) -> None:
    """A canary in its second step, and a morning's requests."""
    start = rollout.start(
        world.registry, "clinic", "clinic@v3", plan=Plan((0.05, 0.25, 0.5, 1.0), timedelta(minutes=30)),
        why="notes of 2025",
    )  # fmt: skip
    from lorchestra.registry.steering import step

    def counted(stable, candidate, gateway):
        tallies = {"stable": Tally(), "candidate": Tally()}
        for arm, (n, bad) in {"stable": stable, "candidate": candidate}.items():
            for k in range(n):
                tallies[arm].failed() if k < bad else tallies[arm].answered(0.7 + 0.004 * (k % 100))
        observe(world.registry.catalog, start.id, gateway, tallies)

    counted((7_770, 78), (412, 5), "g1")
    step(world.registry, "clinic", why="a quiet night")
    counted((12_480, 118), (2_031, 22), "g1")

    async def said(call):
        single = call.target.single
        kind = "clinic" if single is not None and single.name == "clinic" else "other"
        words = SAID[kind].split(" ")
        for k, word in enumerate(words):
            delta = {"delta": {"content": word + " "}} if hasattr(call.body, "messages") else {"text": word + " "}
            yield Chunk([{"index": 0, **delta}], Usage(31, k + 1))

    world.gateway.engine.stream = said
    now = time.time()
    rows = (
        ("ward-3", "clinic@v2", 812, 3, 14), ("ward-3", "clinic@v3", 204, 0, 2), ("ward-7", "triage@v1", 512, 0, 5),
        ("billing", "billing_codes@v1", 330, 0, 0), ("billing", "base", 21, 0, 1), ("lab", "lab_reports@v1", 97, 1, 0),
    )  # fmt: skip
    for tenant, model, n, errors, refused in rows:
        for k in range(n):
            world.usage._clock = lambda k=k, n=n: now - 3300 + 3300 * (k / n) ** 0.8
            status = 500 if k < errors else 429 if k < errors + refused else 200
            name, _, version = model.partition("@")
            members = [{"adapter": name, "coefficient": 1.0, "version": model}] if version else []
            world.usage._count({"kind": "chat", "tenant": tenant, "model": name, "adapters": members, "status": status,
                                "prompt_tokens": 180, "generated_tokens": 96, "seconds": 0.8 + 0.001 * k})  # fmt: skip
    world.usage._clock = time.time


SHOTS = {
    "adapters": ("#/adapters", {}),
    "adapter": ("#/adapters/clinic", {}),
    "version": ("#/versions/clinic@v3", {"colours": "dark", "height": 1250}),
    "compare": ("#/compare?before=clinic%40v2&after=clinic%40v3", {}),
    "traffic": ("#/traffic", {"height": 1000}),
    "playground": ("#/playground", {}),
    "usage": ("#/usage", {"locale": "zh-CN"}),
    "history": ("#/history", {}),
    "narrow-traffic": ("#/traffic", {"width": 360, "height": 1400, "locale": "zh-CN", "colours": "dark"}),
    "narrow-adapters": ("#/adapters", {"width": 360, "height": 760}),
    "narrow-playground": ("#/playground", {"width": 360, "height": 1300}),
    "narrow-version": ("#/versions/clinic@v3", {"width": 360, "height": 1400}),
    "dialog": ("#/traffic", {"height": 900, "colours": "dark"}),
    "login": ("", {"height": 560}),
}


def main(place: Path, *wanted: str) -> None:
    """Take the pictures that are wanted; without any, those of the documentation."""
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory), stock=stock)
        try:
            busy(world)
            with chromium() as browser:
                for name, (where, how) in SHOTS.items():
                    if name in (wanted or ("traffic", "version", "playground")):
                        taken(browser, world, place / f"console-{name}.png", name, where, how)
        finally:
            world.stop()


def taken(browser, world, file, name, where, how) -> None:
    """One picture."""
    with tab(browser, f"{world.address}/console/", trouble=lambda text: "401" in text, **how) as page:
        if name == "login":
            page.locator("form").wait_for()
        else:
            enter(page, world.secrets["ann"])
            page.evaluate(f"location.hash = {where[1:]!r}")
            page.locator("h1").wait_for()
            page.wait_for_timeout(1500)
        if "playground" in name:
            page.locator(".side").first.locator(".member input[list]").fill("clinic")
            page.locator("textarea").first.fill("My daughter, four, has had a fever for three days. What should I do?")
            page.locator("form.play button[type=submit]").click()
            page.locator(".answer-foot", has_text="tokens/s").nth(1).wait_for()
        if name == "dialog":
            page.get_by_role("button", name="Next step").click()
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, f"{name} is {wide} px wider than its window"
        page.mouse.move(2, 2)
        page.evaluate("document.querySelectorAll('dd .breaks').forEach(e => e.textContent = '/srv/adapters')")
        page.screenshot(path=str(file))
    smaller(file)


def smaller(file: Path) -> None:
    """The picture with 48 colours, which is all that the page has."""
    from PIL import Image

    with Image.open(file) as picture:
        few = picture.convert("RGB").quantize(48, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(file, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
