// The page: who is logged in, which view is shown, language and colours.

import * as adapters from "./adapters.js";
import * as compare from "./compare.js";
import * as history from "./history.js";
import { get, post, remember } from "./api.js";
import { fill, h } from "./dom.js";
import { login } from "./login.js";
import { badge, choice, empty, heading, loading, problem, to } from "./parts.js";
import * as playground from "./playground.js";
import * as traffic from "./traffic.js";
import * as usage from "./usage.js";
import * as version from "./version.js";
import { language, speak, t } from "./words.js";

const views = { adapters, versions: version, compare, traffic, playground, usage, history };
const inRegistry = new Set(["adapters", "versions", "compare", "traffic", "history"]);
const tabs = ["adapters", "traffic", "playground", "usage", "history"];
const root = document.getElementById("app");
let session = null;
let leave = new AbortController();

/** The address after the #: parts and query. */
function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  let parts;
  try { parts = path.split("/").filter(Boolean).map(decodeURIComponent); } catch { parts = ["?"]; }
  return { view: parts[0] ?? (session?.registry ? "adapters" : "playground"), parts: parts.slice(1), query: new URLSearchParams(query) };
}

function theme() {
  let chosen = "auto";
  try { chosen = localStorage.getItem("lorchestra-theme") ?? "auto"; } catch { /* the system's */ }
  const select = choice(["auto", "light", "dark"].map((name) => [name, t(`theme_${name}`)]), chosen, (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    try { localStorage.setItem("lorchestra-theme", name); } catch { /* for this visit then */ }
  });
  select.setAttribute("aria-label", t("theme"));
  return select;
}

function tongue() {
  const select = choice([["en", "English"], ["zh", "中文"]], language(), (name) => { speak(name); draw(); });
  select.setAttribute("aria-label", t("language"));
  return select;
}

const brand = () => h("a.brand", { href: "#/" }, h("img", { src: new URL("icon.svg", import.meta.url).href, alt: "", width: 22, height: 22 }), "lorchestra");

function shell(shownView) {
  const owner = shownView === "versions" || shownView === "compare" ? "adapters" : shownView;
  const main = h("main", { id: "main", tabindex: -1 });
  fill(root,
    h("a.skip", { href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); } }, t("skip")),
    h("header.top", null, brand(),
      h("nav.tabs", { "aria-label": t("sections") }, tabs.map((name) => h("a", { href: to(name), "aria-current": name === owner ? "page" : undefined }, t(name)))),
      h("div.me", null, tongue(), theme(),
        h("span.who", null, session.login ? session.name : t("open_server"), session.login ? badge(t(session.role), session.role === "operator" ? "live" : "") : null),
        session.login ? h("button.quiet", { type: "button", onclick: out }, t("logout")) : null)),
    main);
  return main;
}

async function out() {
  try { await post("logout"); } catch { /* it is over either way */ }
  session = null;
  draw();
}

/** Show what the address says. */
async function draw() {
  leave.abort();
  leave = new AbortController();
  const { signal } = leave;
  if (!session) {
    document.title = `${t("login_do")} · lorchestra`;
    fill(root, login({ brand: brand(), controls: [tongue(), theme()], over: draw.over, entered: (made) => { draw.over = false; enter(made); } }));
    root.querySelector("input")?.focus();
    return;
  }
  const here = route();
  const main = shell(here.view);
  const module = views[here.view];
  document.title = `${t(here.view === "versions" ? "version" : here.view)} · lorchestra`;
  if (!module) return void fill(main, heading(t("not_found")), empty(t("not_found")));
  if (inRegistry.has(here.view) && !session.registry) {
    return void fill(main, heading(t(here.view === "versions" ? "version" : here.view)), empty(t("no_registry"), t("no_registry_text"), "lorchestra serve BASE --registry URL"));
  }
  const waits = setTimeout(() => fill(main, loading()), 150);
  try {
    const made = await module.view({ ...here, signal, session, go, again: draw });
    if (signal.aborted) return;
    clearTimeout(waits);
    fill(main, made);
    if (draw.moved) main.querySelector("h1")?.focus({ preventScroll: true });
  } catch (error) {
    clearTimeout(waits);
    if (error.name !== "AbortError" && !signal.aborted) fill(main, problem(error, draw));
  }
}

/** Another query of the same view, without a step back in the browser's history for each key. */
function go(parts, query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value !== "" && value !== 0 && value !== undefined && value !== null);
  const search = new URLSearchParams(kept).toString();
  window.history.replaceState(null, "", `${to(...parts)}${search ? `?${search}` : ""}`);
  return draw();
}

function enter(made) {
  session = made;
  remember(made);
  draw();
}

window.addEventListener("hashchange", () => { draw.moved = true; window.scrollTo(0, 0); draw(); });
window.addEventListener("logged-out", () => { if (session) { session = null; draw.over = true; draw(); } });

fill(root, loading());
try {
  enter(await get("session"));
} catch (error) {
  if (error.status === 401) draw();
  else fill(root, h("main", null, problem(error, () => location.reload())));
}
