// All adapters, and all versions of one: searched and filtered by the server, a page at a time.

import { get } from "./api.js";
import * as changes from "./changes.js";
import { h } from "./dom.js";
import * as f from "./format.js";
import { badge, button, choice, empty, field, heading, link, pager, shown, stateBadge, table, tags, to, versionLink, when } from "./parts.js";
import { t } from "./words.js";

const LIMIT = 50;
const FILTERS = ["text", "tag", "alias", "state", "base", "metric"];

export const view = (here) => (here.parts.length ? one(here) : all(here));

/** The filters of a list; `changed` gets their values when one of them has another. */
function filters(here, words, changed) {
  const now = Object.fromEntries(FILTERS.map((key) => [key, here.query.get(key) ?? ""]));
  let waiting = 0;
  const set = (key, value, patience = 0) => {
    now[key] = value;
    clearTimeout(waiting);
    waiting = setTimeout(() => changed({ ...now }), patience);
  };
  const typed = (key, type, hint) => h("input", { type, value: now[key], placeholder: hint, spellcheck: "false", autocomplete: "off", "data-keep": key, oninput: (event) => set(key, event.target.value.trim(), 250) });
  const among = (key, options) => choice([["", t("any")], ...options.map((word) => [word, word])], now[key], (value) => set(key, value));
  const states = choice([["", t("any")], ["ready", t("ready")], ["revoked", t("revoked")]], now.state, (value) => set("state", value));
  return h("form.filters", { role: "search", onsubmit: (event) => event.preventDefault() },
    field(t("search"), typed("text", "search", t("search_adapters"))), field(t("tag"), among("tag", words.tags)), field(t("alias"), among("alias", words.aliases)),
    field(t("state"), states), field(t("base"), among("base", words.bases)), field(t("metric"), typed("metric", "text", t("metric_hint"))),
    FILTERS.some((key) => now[key]) ? button(t("clear"), () => here.go(place(here)), "quiet") : null);
}

const place = (here) => [here.view, ...here.parts];

/** A list below its filters: typing changes the list and the address, and leaves the filters alone. */
async function listed(here, path, more, draw) {
  const words = await get("facets", {}, here);
  const list = h("div", { "aria-live": "polite" });
  let now = Object.fromEntries(FILTERS.map((key) => [key, here.query.get(key) ?? ""]));
  let offset = Number(here.query.get("offset")) || 0;
  let turn = 0;
  const show = async () => {
    const mine = ++turn;
    await shown(list, here.signal, async () => {
      const found = await get(path, { ...now, ...more, limit: LIMIT, offset }, here);
      if (mine !== turn) throw new DOMException("another was asked for", "AbortError");
      const filtered = Object.values(now).some(Boolean);
      return [draw(found, filtered), pager({ offset, limit: LIMIT, total: found.total }, move)];
    });
  };
  const address = () => {
    const kept = Object.entries({ ...now, offset }).filter(([, value]) => value);
    const search = new URLSearchParams(kept).toString();
    window.history.replaceState(null, "", `${to(...place(here))}${search ? `?${search}` : ""}`);
  };
  const move = (next) => { offset = next; address(); show(); };
  await show();
  return [filters(here, words, (values) => { now = values; move(0); }), list];
}

async function all(here) {
  const columns = [
    { head: t("name"), cell: (row) => [link(to("adapters", row.name), row.name), row.aliases.some((one) => one.canary) ? badge(t("canary"), "live") : null] },
    { head: t("production"), cell: (row) => led(row.aliases.filter((one) => one.alias === "production")) },
    { head: t("other_aliases"), cell: (row) => led(row.aliases.filter((one) => one.alias !== "production"), true) },
    { head: t("newest"), num: true, cell: (row) => versionShort(row.name, row.newest) },
    { head: t("versions"), num: true, cell: (row) => [f.count(row.versions), row.revoked ? h("span.soft", null, ` · ${t("revoked_n", { n: row.revoked })}`) : null] },
    { head: t("base"), cell: (row) => row.base || f.NONE },
    { head: t("changed"), num: true, cell: (row) => when(row.changed) },
  ];
  const body = await listed(here, "adapters", {}, (found, filtered) => table(columns, found.rows, {
    caption: t("adapters"), none: filtered ? undefined : empty(t("none_adapters"), t("none_adapters_text"), "lorchestra registry push DIR clinic"),
  }));
  return [heading(t("adapters"), h("p.actions", null, link(to("compare"), t("compare_title")))), ...body];
}

const versionShort = (name, number) => link(to("versions", `${name}@v${number}`), `v${number}`);

function led(aliases, named = false) {
  if (!aliases.length) return f.NONE;
  return h("span.led", null, aliases.map((one) => h("span", null, named ? h("span.soft", null, `${one.alias} → `) : null, versionShort(one.name, one.number), one.state === "revoked" ? stateBadge("revoked") : null)));
}

export function metric(found) {
  if (!found) return f.NONE;
  const told = [found.split, found.n ? `n = ${f.count(found.n)}` : ""].filter(Boolean).join(", ");
  const { value, interval } = f.measured(found);
  return h("span.metric", { title: told || undefined }, h("b", null, value), interval ? h("small", null, interval) : null);
}

/** The metrics that most rows have. */
function common(rows, most = 3) {
  const counts = new Map();
  for (const row of rows) for (const name of Object.keys(row.metrics)) counts.set(name, (counts.get(name) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)).slice(0, most).map(([name]) => name);
}

async function one(here) {
  const name = here.parts[0];
  const { rows: aliases } = await get("aliases", { name, limit: 200 }, here);
  const operates = here.session.role === "operator";
  const picked = new Set();
  const go = h("button.primary", { type: "button", disabled: true, onclick: () => { const [after, before] = [...picked].sort((a, b) => Number(b.split("@v")[1]) - Number(a.split("@v")[1])); location.hash = `#/compare?before=${encodeURIComponent(before)}&after=${encodeURIComponent(after)}`; } }, t("compare_two"));
  const pick = (row) => h("input", { type: "checkbox", "aria-label": t("select_version", { name: row.reference }), checked: picked.has(row.reference), onchange: (event) => {
    if (event.target.checked) picked.add(row.reference); else picked.delete(row.reference);
    go.disabled = picked.size !== 2;
  } });
  const draw = (found, filtered) => {
    const columns = [
      { head: t("version"), cell: (row) => h("span.pick", null, pick(row), link(to("versions", row.reference), `v${row.number}`)) },
      { head: t("state"), cell: (row) => [stateBadge(row.state), row.aliases.map((word) => badge(word, "live"))] },
      ...common(found.rows).map((key) => ({ head: key, num: true, cell: (row) => metric(row.metrics[key]) })),
      { head: t("tags"), cell: (row) => tags(row.tags) },
      { head: t("rank"), num: true, cell: (row) => f.rank(row.ranks) },
      { head: t("base"), cell: (row) => row.base || f.NONE },
      { head: t("note"), kind: "note", cell: (row) => (row.note ? h("span", { title: row.note }, row.note) : f.NONE) },
      { head: t("created"), num: true, cell: (row) => h("span", { title: row.created_by }, when(row.created)) },
    ];
    if (operates) columns.push({ head: "", cell: (row) => (row.state === "ready" && !row.aliases.includes("production") ? button(t("promote"), () => changes.promote(row, "production", here.again), "small") : null) });
    return table(columns, found.rows, { caption: t("versions"), none: filtered ? undefined : empty(t("none_adapters"), t("none_adapters_text"), `lorchestra registry push DIR ${name}`), rowClass: (row) => (row.aliases.includes("production") ? "chosen" : "") });
  };
  const body = await listed(here, "versions", { name }, draw);
  const pointers = aliases.length ? h("ul.pointers", null, aliases.map((alias) => h("li", null,
    h("span.pointer", null, h("b", null, alias.alias), " → ", versionLink(alias.reference), alias.canary ? badge(t("canary"), "live") : null), h("span.soft", null, when(alias.since), " · ", alias.by),
    operates ? h("span.row-actions", null, alias.canary ? link(to("traffic"), t("traffic")) : button(t("start_canary"), () => changes.start(alias, () => { location.hash = "#/traffic"; }), "small"), button(t("rollback"), () => changes.rollback(alias, here.again), "small")) : null))) : h("p.soft", null, t("no_alias"));
  return [heading([h("a.crumb", { href: to("adapters") }, t("adapters")), " / ", name], h("p.actions", null, h("span.soft", null, t("select_two")), go)), pointers, ...body];
}
