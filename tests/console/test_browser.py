"""The page in Chromium: what people do there, and that nothing goes wrong in it on the way."""

from __future__ import annotations

import re

import pytest
from tests.console.browser import NEEDED, chromium, enter, tab
from tests.console.world import EVIL, World
from tests.serve.registry_world import until

from lorchestra.registry.access import remove_key
from lorchestra.serve.engine import Choice, Chunk, Target, Usage

pytestmark = NEEDED


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("browser"))
    yield world
    world.stop()


def known(text):
    """Chromium writes refusals (not logged in yet, a gate) into its console; they are answers."""
    return re.search(r"status of (401|403|404|409|400)", text) is not None


def opened(browser, world, name="ann", at="", **how):
    page = tab(browser, f"{world.address}/console/{at}", trouble=known, **how)
    return _Entered(page, world.secrets.get(name))


class _Entered:
    def __init__(self, page, secret):
        self._page, self._secret = page, secret

    def __enter__(self):
        page = self._page.__enter__()
        if self._secret:
            enter(page, self._secret)
        page.locator("h1").first.wait_for()
        return page

    def __exit__(self, *told):
        return self._page.__exit__(*told)


def reason(page, text, action):
    page.get_by_role("dialog").get_by_label("Reason").fill(text)
    page.get_by_role("dialog").get_by_role("button", name=action, exact=True).click()
    page.get_by_role("dialog").wait_for(state="detached")


def fits(page):
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_login_refuses_wrong_keys_in_words_and_lets_right_ones_in_and_out(browser, world):
    with opened(browser, world, name="") as page:
        page.locator("input[name=key]").fill("lo-wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("no key of this server").wait_for()
        enter(page, world.secrets["vic"])
        assert page.locator(".who").inner_text().split() == ["vic", "viewer"]
        page.get_by_role("link", name="clinic", exact=True).click()
        page.get_by_role("heading", name="clinic").wait_for()
        assert page.get_by_role("button", name="Promote").count() == 0, "a viewer has nothing to press"
        assert page.evaluate("document.cookie") == ""
        page.get_by_role("button", name="Log out").click()
        page.locator("input[name=key]").wait_for()
        page.reload()
        page.locator("input[name=key]").wait_for()


def test_a_promotion_asks_for_a_reason_and_is_followed(browser, world):
    with opened(browser, world, at="#/adapters/clinic") as page:
        row = page.get_by_role("row", name=re.compile("v3"))
        row.get_by_role("button", name="Promote").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("button", name="Promote", exact=True).click()
        dialog.get_by_text("Write a reason first.").wait_for()
        dialog.get_by_label("Gates").fill("loss<=0.5")
        dialog.get_by_label("Reason").fill("lower loss")
        dialog.get_by_role("button", name="Promote", exact=True).click()
        dialog.get_by_text("measured 1.12").wait_for()
        dialog.get_by_label("Gates").fill("loss<=1.2")
        reason(page, "lower loss", "Promote")
        page.locator("tr.chosen", has_text="v3").wait_for()
        until(lambda: world.gateway.by("clinic", key=world.secrets["uma"]) == "clinic@v3", 5)
        page.locator(".pointers").get_by_role("button", name="Roll back").click()
        reason(page, "the ward prefers the old one", "Roll back")
        page.locator("tr.chosen", has_text="v1").wait_for()
        entries = world.registry.history("clinic", limit=2)
        assert [(entry.actor, entry.action, entry.why) for entry in entries] == [
            ("ann", "rollback", "the ward prefers the old one"), ("ann", "promote", "lower loss"),
        ]  # fmt: skip


def test_a_canary_is_started_held_stepped_and_aborted_with_the_keyboard(browser, world):
    with opened(browser, world, at="#/traffic") as page:
        page.get_by_text("No canary is running").wait_for()
        row = page.get_by_role("row", name=re.compile("^clinic@production"))
        row.get_by_role("button", name="Start canary").focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Candidate").select_option("clinic@v2")
        dialog.get_by_label("Steps, % of users").fill("5, 50, 100")
        reason(page, "notes of 2025", "Start")
        card = page.locator("article.canary")
        card.get_by_text("step 1 of 3").wait_for()
        card.get_by_text("5 %").first.wait_for()
        card.get_by_role("button", name="Change hold").click()
        page.get_by_role("dialog").get_by_label("Hold of each step").fill("2d")
        reason(page, "weekend", "Change hold")
        card.get_by_text("held for another").or_(card.get_by_text("of the 100")).wait_for()
        card.get_by_role("button", name="Next step").click()
        reason(page, "looks well", "Next step")
        card.get_by_text("step 2 of 3").wait_for()
        card.get_by_role("button", name="Abort").focus()
        page.wait_for_timeout(2500)
        assert page.evaluate("document.activeElement.textContent") == "Abort", "looking again takes no focus away"
        page.keyboard.press("Enter")
        reason(page, "answers in French", "Abort")
        page.get_by_text("No canary is running").wait_for()
        page.get_by_role("row", name=re.compile("aborted")).get_by_text("answers in French").wait_for()
    actions = [entry.action for entry in world.registry.history("clinic", limit=4)]
    assert actions == ["canary-abort", "canary-step", "canary-step", "canary-start"]


def test_the_playground_mixes_and_shows_two_answers_as_text(browser, world):
    asked = []

    async def said(call):
        asked.append((call.body.model, call.body.messages[-1].content))
        for k, part in enumerate(("a ", EVIL, f" of {call.body.model}")):
            yield Chunk([{"index": 0, "delta": {"content": part}}], Usage(3, k + 1))

    before, world.gateway.engine.stream = world.gateway.engine.stream, said
    try:
        with opened(browser, world, at="#/playground") as page:
            sides = page.locator(".side")
            sides.first.locator(".member input[list]").fill("legal")
            mixed = sides.nth(1)
            mixed.locator("input[type=range]").first.fill("0.3")
            assert re.fullmatch(r"clinic=0.3\+legal=0.5|legal=0.3\+clinic=0.5", mixed.locator(".model").inner_text())
            page.get_by_label("Prompt", exact=True).fill("hello?")
            page.keyboard.press("Control+Enter")
            page.locator(".answer-foot", has_text="3 tokens").nth(1).wait_for()
            assert sides.first.locator(".text").inner_text() == f"a {EVIL} of legal"
            assert EVIL in mixed.locator(".text").inner_text()
            assert page.locator(".answer img").count() == 0
            assert "stolen" not in page.title()
            assert "answered by legal@v1" in sides.first.locator(".answer-foot").inner_text()
            assert ("legal", "hello?") in asked
            page.locator(".side").first.locator(".member input[list]").fill("nobody")
            page.get_by_role("button", name="Send to both").click()
            sides.first.get_by_text("does not exist").wait_for()
    finally:
        world.gateway.engine.stream = before


def test_the_playground_shows_what_a_gate_chose_for_each_group_of_layers(browser, world):
    choice = Choice("triage", {"clinic": 0.5, EVIL: 0.25}, (), {"layers.0-9": {"clinic": 1.0, EVIL: 0.5}, "other": {}})

    class Chooser:
        def has(self, model):
            return True

        def cards(self, key):
            return ()

        async def target(self, key, body):
            return Target(body.model, choice=choice)

    async def said(call):
        yield Chunk([{"index": 0, "delta": {"content": "well"}}], Usage(3, 1))

    inner = world.gateway.gateway
    before, world.gateway.engine.stream, inner._choosing = world.gateway.engine.stream, said, Chooser()
    try:
        with opened(browser, world, at="#/playground") as page:
            page.get_by_label("Prompt", exact=True).fill("hello?")
            page.get_by_role("button", name="Send to both").click()
            shown = page.locator(".side .chosen").first
            shown.get_by_text("other", exact=True).wait_for()
            lines = [line for line in shown.inner_text().split("\n") if line.strip()]
            assert lines == [
                "triage chose for this prompt:", "layers.0-9", "clinic", "1", EVIL, "0.5", "other", "base alone"
            ]  # fmt: skip
            assert shown.locator("meter").count() == 2
    finally:
        world.gateway.engine.stream, inner._choosing = before, None


def test_a_note_is_text_wherever_it_is_shown(browser, world):
    with opened(browser, world, at="#/adapters/clinic") as page:
        page.get_by_text(EVIL).wait_for()
        page.evaluate("location.hash = '#/versions/clinic@v2'")
        page.locator("p.lead", has_text="onerror").wait_for()
        page.get_by_text("Manifest", exact=True).click()
        page.locator("pre.json", has_text="onerror").wait_for()
        assert page.locator("main img").count() == 0
        assert "stolen" not in page.title()


def test_lineage_compare_history_and_usage_are_drawn(browser, world):
    world.gateway.ask("legal", world.secrets["uma"])
    with opened(browser, world, at="#/versions/clinic@v3") as page:
        nodes = page.locator(".graph .node")
        nodes.nth(2).wait_for()
        boxes = [nodes.nth(k).locator("rect").bounding_box() for k in range(3)]
        for k, one in enumerate(boxes):
            for other in boxes[k + 1 :]:
                apart = one["x"] + one["width"] < other["x"] or other["x"] + other["width"] < one["x"]
                above = one["y"] + one["height"] < other["y"] or other["y"] + other["height"] < one["y"]
                assert apart or above, "no box lies on another"
        assert [bar.inner_text() for bar in page.locator(".bars .num").all()] == ["0.3", "0.5"]
        page.locator(".graph a.node", has_text="clinic@v1").focus()
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="v1").wait_for()
        page.evaluate("location.hash = '#/adapters/clinic'")
        for version in ("clinic@v1", "clinic@v3"):
            page.get_by_label(f"Select {version} to compare").check()
        page.get_by_role("button", name="Compare the two selected").click()
        page.get_by_role("heading", name="Distance of the weights").wait_for()
        page.get_by_role("row", name=re.compile("^loss")).get_by_text("better").wait_for()
        page.get_by_role("link", name="History").click()
        page.get_by_role("row", name=re.compile("push")).first.wait_for()
        page.get_by_role("link", name="Usage").click()
        page.get_by_role("row", name=re.compile("uma")).first.wait_for()


def test_search_asks_the_server_and_keeps_the_cursor(browser, world):
    with opened(browser, world, at="#/adapters") as page:
        page.get_by_label("Search").press_sequentially("leg", delay=40)
        page.get_by_text("1–1 of 1").wait_for()
        assert page.evaluate("document.activeElement.type") == "search"
        assert page.url.endswith("text=leg")
        page.get_by_label("Search").fill("nobody")
        page.get_by_text("Nothing matches").wait_for()


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
def test_every_view_in_both_languages_and_colours_narrow_and_wide(browser, world, colours, width, locale):
    views = {
        "adapters": "适配器", "adapters/clinic": "clinic", "versions/clinic@v3": "v3",
        "compare?before=clinic&after=legal": "比较", "traffic": "流量", "playground": "试用", "usage": "用量",
        "history": "历史",
    }  # fmt: skip
    with opened(browser, world, width=width, locale=locale, colours=colours) as page:
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 150) == (colours == "dark")
        for view, chinese in views.items():
            page.evaluate(f"location.hash = '#/{view}'")
            page.wait_for_function(
                "view => document.querySelector('h1') && location.hash === '#/' + view "
                "&& !document.querySelector('.loading')",
                arg=view,
            )
            page.wait_for_timeout(150)
            title = page.locator("h1").inner_text()
            assert (chinese in title) == (locale == "zh-CN" or chinese.isascii()), (view, title)
            assert page.locator(".problem").count() == 0, view
            fits(page)
            unnamed = page.evaluate(
                "[...document.querySelectorAll('button, a, input, select, textarea')].filter(e => !("
                "e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML)"
            )
            assert unnamed == [], view


def test_language_and_colours_are_switched_and_remembered(browser, world):
    with opened(browser, world) as page:
        page.get_by_label("Language").select_option("zh")
        page.get_by_role("heading", name="适配器").wait_for()
        page.get_by_label("配色").select_option("dark")
        page.reload()
        page.get_by_role("heading", name="适配器").wait_for()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate("document.documentElement.lang") == "zh-Hans"


def test_a_revoked_key_leads_back_to_the_login(browser, tmp_path):
    world = World(tmp_path)
    try:
        with opened(browser, world, at="#/traffic") as page:
            remove_key(world.keys_file, "ann")
            page.get_by_text("The session is over").wait_for(timeout=10_000)
    finally:
        world.stop()


def test_a_server_without_keys_and_with_an_empty_registry_has_words_for_it(browser, tmp_path):
    from lorchestra.registry.registry import Registry

    world = World(tmp_path, keyed=False, stock=lambda url, place: Registry.open(url, create=True))
    try:
        with opened(browser, world, name="") as page:
            for view, words in {
                "adapters": "No adapters yet", "traffic": "No aliases yet", "usage": "No requests yet",
                "history": "Nothing has happened yet", "compare": "Which two?", "playground": "No answer yet",
                "versions/clinic@v1": "it is empty", "nowhere": "There is no such page",
            }.items():  # fmt: skip
                page.evaluate(f"location.hash = '#/{view}'")
                page.get_by_text(words).first.wait_for()
            assert "no login" in page.locator(".who").inner_text()
    finally:
        world.stop()
