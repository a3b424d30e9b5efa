// Who answers what just now: canaries with what is seen of them, and where every alias leads. Looked at every two seconds.

import { get } from "./api.js";
import * as changes from "./changes.js";
import { spanOf, split, strip } from "./charts.js";
import { fill, h } from "./dom.js";
import * as f from "./format.js";
import { badge, button, empty, facts, field, heading, link, pager, section, shown, stateBadge, table, to, versionLink, when } from "./parts.js";
import { t } from "./words.js";

const EVERY = 2000;
const LIMIT = 50;

export async function view(here) {
  const operates = here.session.role === "operator";
  let found = await get("traffic", {}, here);
  const [running, ended, server] = [h("div"), h("div"), h("div")];
  const live = h("span.live-dot", { role: "status" }, t("live"));
  const cards = new Map();
  let drawn = "";

  async function look(poll = false) {
    try {
      found = await get("traffic", {}, { signal: here.signal, poll });
      fill(live, t("live"));
      live.className = "live-dot";
      draw();
    } catch (error) {
      if (error.name === "AbortError") return;
      fill(live, t("stopped", { why: error.message }));
      live.className = "live-dot off";
    }
  }

  const changed = async () => { await look(); aliases.show(); };

  /** What changes all the time is drawn anew; the buttons stay, so that a hand or a keyboard can rest on them. */
  function draw() {
    const keys = found.running.map((one) => one.id).join();
    for (const one of found.running) {
      const kept = cards.get(one.id) ?? card();
      cards.set(one.id, kept);
      fill(kept.body, canaryBody(one));
      const state = `${one.step} ${one.action} ${one.plan.hold}`;
      if (kept.state !== state && operates) fill(kept.actions, canaryActions(one, changed));
      kept.state = state;
    }
    if (keys !== drawn || !running.childNodes.length) {
      drawn = keys;
      fill(running, found.running.length ? found.running.map((one) => cards.get(one.id).element) : empty(t("none_canaries"), t("none_canaries_text")));
    }
    fill(ended, found.ended.length ? section(t("ended"), endedTable(found.ended)) : null);
    fill(server, served(found.server));
  }

  const aliases = aliasList(here, operates, changed);
  draw();
  aliases.show();
  const timer = setInterval(() => { if (!document.hidden) look(true); }, EVERY);
  here.signal.addEventListener("abort", () => clearInterval(timer));
  return [heading(t("traffic"), h("p.actions", null, live)), server, section(t("canaries"), running), aliases.element, ended];
}

function card() {
  const [body, actions] = [h("div"), h("div.actions")];
  return { body, actions, element: h("article.card.canary", null, body, actions), state: null };
}

function served(server) {
  return [
    server.down ? h("div.problem", { role: "alert" }, h("p", null, t("down", { why: server.down }))) : null,
    facts([
      [t("registry"), h("span.breaks", null, server.registry)], [t("generation"), f.count(server.generation)],
      [t("seen"), t("seen_ago", { n: f.number(server.stale_seconds, 2) })],
      ...(server.hidden.length ? [[t("hidden"), h("span.breaks", null, server.hidden.join(", "))]] : []),
    ]),
    server.failures.length ? section(t("failing"), table([{ head: t("version"), cell: (row) => versionLink(row.version) }, { head: t("kind"), cell: (row) => badge(row.kind, "bad") }, { head: t("reason"), cell: (row) => row.why, kind: "why" }], server.failures, { caption: t("failing") })) : null,
  ];
}

function canaryBody(one) {
  const names = { stable: one.stable, candidate: one.candidate };
  const arms = ["stable", "candidate"].map((arm) => ({ arm, ...one.arms[arm], share: arm === "stable" ? Math.round(1e6 * (1 - one.share)) / 1e6 : one.share }));
  return [
    h("div.card-head", null, h("h3", null, `${one.name}@${one.alias}`), stateBadge(one.state), h("span.soft", null, t("step_of", { a: one.step + 1, b: one.plan.steps.length }), " · ", t("started_by", { when: f.ago(one.started), who: one.by }))),
    one.why ? h("p.lines", null, one.why) : null,
    one.tried_here === false ? h("p.problem-line", null, t("not_here")) : null,
    split(one.share, one.plan.steps, names),
    h("div.two", null,
      table([
        { head: "", cell: (row) => h(`span.arm.${row.arm}`, null, t(row.arm)) }, { head: t("version"), cell: (row) => versionLink(names[row.arm]) }, { head: t("users"), num: true, cell: (row) => f.percent(row.share) }, { head: t("requests"), num: true, cell: (row) => f.count(row.requests) },
        { head: t("errors"), num: true, cell: (row) => (row.requests ? `${f.count(row.errors)} (${f.percent(row.error_rate, 2)})` : f.NONE) }, { head: t("latency"), num: true, cell: (row) => f.seconds(row.latency) }, { head: t("score"), num: true, cell: (row) => (row.scores ? `${f.number(row.score, 3)} (n = ${f.count(row.scores)})` : f.NONE) },
      ], arms, { caption: t("traffic") }),
      guards(one.readings)),
    h("p.next", null, h("b", null, t("what_next")), " ", one.next),
    one.steps.length ? h("details.inline", null, h("summary", null, `${t("steps_before")} · ${one.steps.length}`), table([
      { head: t("share"), num: true, plain: true, cell: (row) => f.percent(row.share) }, { head: t("since"), cell: (row) => when(row.from, f.time(row.from)) }, { head: t("stable"), num: true, cell: (row) => `${f.count(row.arms.stable.requests)} / ${f.count(row.arms.stable.errors)}` }, { head: t("candidate"), num: true, cell: (row) => `${f.count(row.arms.candidate.requests)} / ${f.count(row.arms.candidate.errors)}` },
    ], one.steps, { caption: t("steps_before") })) : null,
  ];
}

function guards(readings) {
  if (!readings.length) return null;
  const kinds = { holds: "good", broken: "bad", unsure: "" };
  const bounds = (row) => `[${f.difference(row.low, row.form, "−∞")}, ${f.difference(row.high, row.form, "∞")}]`;
  return h("div", null, table([
    { head: t("guard"), cell: (row) => t(`guard_${row.guard}`) }, { head: t("worse_by"), num: true, cell: (row) => f.difference(row.worse, row.form) },
    { head: t("interval"), cell: (row) => h("span.strip-cell", null, strip({ value: row.worse, low: row.low, high: row.high, mark: row.allowed, span: spanOf([row.low ?? -3 * row.allowed, row.high ?? 3 * row.allowed, row.allowed, 0]), kind: row.state, label: bounds(row) }), h("small", null, bounds(row))) },
    { head: t("allowed"), num: true, cell: (row) => f.difference(row.allowed, row.form) }, { head: t("verdict"), cell: (row) => badge(t(row.state), kinds[row.state]) },
  ], readings, { caption: t("guards") }), h("p.hint", null, t("always")));
}

function canaryActions(one, changed) {
  return [
    one.step + 1 < one.plan.steps.length ? button(t("step_now"), () => changes.step(one, changed)) : null, button(t("change_hold"), () => changes.hold(one, changed)),
    button(t("promote"), () => changes.finish(one, changed), "primary"), button(t("abort"), () => changes.abort(one, changed), "danger"),
  ];
}

function endedTable(rows) {
  return table([
    { head: t("alias"), cell: (row) => `${row.name}@${row.alias}` }, { head: t("state"), cell: (row) => stateBadge(row.state) }, { head: t("candidate"), cell: (row) => versionLink(row.candidate) }, { head: t("stable"), cell: (row) => versionLink(row.stable) },
    { head: t("share"), num: true, cell: (row) => f.percent(row.share) }, { head: t("reason"), cell: (row) => row.why || f.NONE, kind: "why" }, { head: t("when"), num: true, cell: (row) => when(row.ended) },
  ], rows, { caption: t("ended") });
}

function aliasList(here, operates, changed) {
  const place = h("div", { "aria-live": "polite" });
  let [text, offset, waiting] = ["", 0, 0];
  const search = h("input", { type: "search", placeholder: t("search_alias"), spellcheck: "false", autocomplete: "off", oninput: (event) => { clearTimeout(waiting); waiting = setTimeout(() => { text = event.target.value.trim(); offset = 0; show(); }, 250); } });
  const show = () => shown(place, here.signal, async () => {
    const found = await get("aliases", { text, limit: LIMIT, offset }, here);
    const columns = [
      { head: t("alias"), cell: (row) => [link(to("adapters", row.name), row.name), h("span.soft", null, `@${row.alias}`)] }, { head: t("version"), cell: (row) => versionLink(row.reference) }, { head: t("state"), cell: (row) => [stateBadge(row.state), row.canary ? badge(t("canary"), "live") : null] },
      { head: t("since"), num: true, cell: (row) => when(row.since) }, { head: t("by"), cell: (row) => row.by },
    ];
    if (operates) columns.push({ head: "", cell: (row) => h("span.row-actions", null, row.canary ? null : button(t("start_canary"), () => changes.start(row, changed), "small"), button(t("rollback"), () => changes.rollback(row, changed), "small")) });
    return [table(columns, found.rows, { caption: t("aliases"), none: text ? undefined : empty(t("none_aliases"), t("none_aliases_text"), "lorchestra registry promote clinic@v1") }), pager({ offset, limit: LIMIT, total: found.total }, (next) => { offset = next; show(); })];
  });
  return { show, element: section(t("aliases"), h("form.filters", { role: "search", onsubmit: (event) => event.preventDefault() }, field(t("search"), search)), place) };
}
