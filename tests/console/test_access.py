"""Who may do what at the console: every route of the table, sessions, tokens, origins, hosts, tries, headers."""

from __future__ import annotations

import json
import time

import pytest
from tests.serve.registry_world import until

from lorchestra.console.guard import HEADERS
from lorchestra.console.sessions import AGAIN, IDLE, LONGEST, TRIES, Attempts, Sessions
from lorchestra.registry.access import Key, Keys, hashed, read_keys, remove_key

ANYBODY = {"/api/login"}  # it begins a session; origin and key guard it
MAY_LOOK = {"/api/logout", "/api/ask"}  # what a viewer may send: both leave the registry alone


def changes(world):
    found = [route.path for route in world.console.routes if route.method != "GET"]
    assert len(found) > 10, "the routes were found"
    return found


def code(answer):
    return answer.status_code, answer.json()["error"]["code"]


def generation(world):
    return world.registry.generation()


def test_no_change_without_session_origin_token_or_role_on_any_route(world):
    ann, vic, stranger = world.browser("ann"), world.browser("vic"), world.browser()
    before = generation(world)
    for path in changes(world):
        name = path.removeprefix("/api/")
        for origin in ("", "null", "https://elsewhere.example", world.address + ".elsewhere.example"):
            assert code(ann.post(name, origin=origin)) == (403, "forged"), (path, origin)
        assert code(ann.post(name, **{"sec-fetch-site": "cross-site"})) == (403, "forged"), path
        if path in ANYBODY:
            continue
        assert stranger.post(name).status_code == 401, path
        for token in ("", "wrong", vic.token):
            assert code(ann.post(name, **{"x-lorchestra-csrf": token})) == (403, "forged"), (path, token)
        if path not in MAY_LOOK:
            assert code(vic.post(name)) == (403, "forbidden"), path
    assert generation(world) == before
    logged = [line for line in world.gateway.lines if line["kind"] == "console"]
    for path in changes(world):
        statuses = {line["status"] for line in logged if line["path"] == f"/console{path}"}
        assert 403 in statuses, path
        assert path in ANYBODY or 401 in statuses, path


def test_no_route_but_session_is_read_without_a_session(shared):
    stranger = shared.browser()
    reads = [route.path.removeprefix("/api/") for route in shared.console.routes if route.method == "GET"]
    assert len(reads) > 8
    for name in reads:
        assert code(stranger.get(name)) == (401, "invalid_api_key"), name


def test_every_route_is_in_the_table(shared):
    routes = {route.path for route in shared.console.app().routes}
    table = {route.path for route in shared.console.routes}
    assert routes - table == {"/", "/assets/{version}/{name}"}


def test_the_session_cookie_is_out_of_reach_for_scripts_and_other_sites(shared):
    answer = shared.browser().login(shared.secrets["ann"])
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie, "this server has no TLS"
    id = answer.cookies["lorchestra-console"]
    assert len(id) >= 43, "256 bits in base 64"
    assert id not in json.dumps(answer.json())
    assert shared.secrets["ann"] not in answer.text


def test_behind_tls_the_cookie_is_secure_and_bound_to_the_host(shared):
    browser = shared.browser()
    secure = browser.origin.replace("http://", "https://")
    answer = browser.post("login", {"key": shared.secrets["ann"]}, origin=secure, **{"x-forwarded-proto": "https"})
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-lorchestra-console=")
    assert "secure" in cookie.lower()


def test_roles_at_the_door(shared):
    assert code(shared.browser().login("lo-nobody")) == (401, "invalid_api_key")
    assert code(shared.browser().login(shared.secrets["uma"])) == (403, "forbidden")
    told = shared.browser("vic").get("session").json()
    assert (told["name"], told["role"], told["login"]) == ("vic", "viewer", True)


def test_a_viewers_key_asks_as_a_users_and_operates_nothing(shared):
    assert shared.gateway.ask("clinic", shared.secrets["vic"]).status_code == 200
    assert shared.gateway.get("/metrics", shared.secrets["vic"]).status_code == 403
    assert shared.gateway.get("/admin/registry", shared.secrets["vic"]).status_code == 403


def test_logging_out_ends_the_session(world):
    ann = world.browser("ann")
    kept = dict(ann.client.cookies)
    assert ann.post("logout").status_code == 200
    for name, value in kept.items():
        ann.client.cookies.set(name, value)
    assert ann.get("adapters").status_code == 401


def test_logging_in_again_takes_another_session_and_ends_the_one_before(world):
    ann = world.browser("ann")
    first = ann.client.cookies["lorchestra-console"]
    ann.login(world.secrets["ann"])
    assert ann.client.cookies["lorchestra-console"] != first
    assert len(world.console.sessions) == 1


def test_a_revoked_key_ends_its_sessions_within_two_looks_at_the_file(world):
    ann = world.browser("ann")
    assert ann.get("adapters").status_code == 200
    remove_key(world.keys_file, "ann")
    took = until(lambda: ann.get("adapters").status_code == 401, 5)
    assert took < 2
    assert ann.post("promote", {"reference": "clinic@v2", "why": "x"}).status_code == 401


def test_a_key_that_becomes_a_viewers_changes_nothing_any_more(world):
    ann = world.browser("ann")
    text = world.keys_file.read_text()
    assert "role: operator" in text
    world.keys_file.write_text(text.replace("role: operator", "role: viewer"))
    assert read_keys(world.keys_file)
    until(lambda: ann.post("promote", {"reference": "clinic@v2", "why": "x"}).status_code == 403, 5)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


KEY = Key(name="ann", sha256=hashed("k"), role="operator")


def test_sessions_end_when_they_are_idle_and_when_they_are_old():
    clock = Clock()
    sessions = Sessions(Keys((KEY,)), clock)
    id, _ = sessions.begin(KEY)
    clock.now += IDLE - 1
    assert sessions.find(id)
    clock.now += IDLE - 1
    assert sessions.find(id, by_itself=True), "a page that asks by itself is answered"
    clock.now += 2
    assert sessions.find(id) is None, "and keeps no session alive"
    id, _ = sessions.begin(KEY)
    until_old = clock.now + LONGEST
    while clock.now + IDLE / 2 <= until_old:
        assert sessions.find(id)
        clock.now += IDLE / 2
    clock.now = until_old + 1
    assert sessions.find(id) is None
    assert len(sessions) == 0


def test_ids_and_tokens_are_never_the_same():
    sessions = Sessions(None)
    made = [sessions.begin(KEY) for _ in range(200)]
    assert len({id for id, _ in made} | {session.csrf for _, session in made}) == 400


def test_tries_are_limited_by_address_and_come_back():
    clock = Clock()
    attempts = Attempts(clock)
    assert [attempts.take("a") for _ in range(TRIES)] == [0.0] * TRIES
    assert 0 < attempts.take("a") <= AGAIN
    assert attempts.take("b") == 0.0
    clock.now += AGAIN
    assert attempts.take("a") == 0.0
    assert attempts.take("a") > 0
    attempts.forgive("a")
    assert attempts.take("a") == 0.0


def test_too_many_wrong_keys_are_made_to_wait(world):
    browser = world.browser()
    for _ in range(TRIES):
        assert browser.login("lo-wrong").status_code == 401
    refused = browser.login(world.secrets["ann"])
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= AGAIN
    statuses = [line["status"] for line in world.gateway.lines if line.get("path") == "/console/api/login"]
    assert statuses == [401] * TRIES + [429]


def test_without_keys_nobody_logs_in_and_changes_need_a_token_all_the_same(keyless):
    browser = keyless.browser()
    assert browser.get("session").json()["login"] is False
    body = {"reference": "clinic@v2", "why": "quick"}
    assert code(browser.post("promote", body, **{"x-lorchestra-csrf": "wrong"})) == (403, "forged")
    assert code(browser.post("promote", body, origin="http://elsewhere.example")) == (403, "forged")
    assert browser.post("promote", body).status_code == 200
    assert keyless.registry.history(limit=1)[0].actor == "anonymous"


@pytest.mark.parametrize("host", ["elsewhere.example", "127.0.0.1.elsewhere.example"])
def test_without_keys_no_other_name_leads_to_the_console(keyless, host):
    """A page elsewhere may point its own name at this machine; its origin is then this host's (DNS rebinding)."""
    browser = keyless.browser()
    answer = browser.client.get("/console/api/session", headers={"host": host})
    assert code(answer) == (403, "forged")
    answer = browser.post("promote", {"reference": "clinic@v2", "why": "x"}, host=host, origin=f"http://{host}")
    assert code(answer) == (403, "forged")
    assert keyless.registry.resolve("clinic").reference == "clinic@v1"


def test_every_answer_has_the_headers_of_a_page(shared):
    ann = shared.browser("ann")
    page = ann.client.get("/console/")
    asset = page.text.split('src="')[1].split('"')[0]
    answers = [
        ann.client.get("/console"), page, ann.client.get(f"/console/{asset}"), ann.client.get("/console/nothing"),
        ann.get("adapters"), ann.get("version", reference="nobody"), ann.post("promote", origin="null"),
    ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [308, 200, 200, 404, 200, 404, 403]
    for answer in answers:
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS, answer.url
    policy = HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert ann.get("adapters").headers["cache-control"] == "no-store"
    assert "content-security-policy" not in shared.gateway.get("/health").headers, "the API is as it was"


def test_a_large_or_odd_body_is_refused(shared):
    ann = shared.browser("ann")
    assert ann.post("promote", {"reference": "x" * (1 << 20), "why": "x"}).status_code == 400
    headers = {"origin": ann.origin, "x-lorchestra-csrf": ann.token}
    assert ann.client.post("/console/api/promote", content=b"{}", headers=headers).status_code == 400
    headers["content-type"] = "application/json"
    assert ann.client.post("/console/api/promote", content=b"{", headers=headers).status_code == 400
    assert ann.post("promote", {"reference": "clinic@v1", "why": "x", "whom": "y"}).status_code == 400
    assert ann.get("history", limit="many").status_code == 400


def test_a_page_that_looks_by_itself_says_so(world):
    ann = world.browser("ann")
    session = next(iter(world.console.sessions._held.values()))
    before = session.seen
    time.sleep(0.01)
    assert ann.client.get("/console/api/traffic", headers={"x-lorchestra-poll": "1"}).status_code == 200
    assert session.seen == before
    ann.get("traffic")
    assert session.seen > before
