// The audit log, the newest entry first.

import { get } from "./api.js";
import { h } from "./dom.js";
import * as f from "./format.js";
import { badge, button, choice, empty, field, heading, problem, table, versionLink, when } from "./parts.js";
import { t } from "./words.js";

const KEYS = ["name", "alias", "action", "actor"];
const ACTIONS = ["push", "promote", "rollback", "alias", "unalias", "revoke", "restore", "canary-start", "canary-step", "canary-promote", "canary-abort", "canary-rollback", "accept", "derive", "gc", "import", "restore-backup", "access"];
const kinds = { rollback: "bad", revoke: "bad", "canary-rollback": "bad", "canary-abort": "bad", promote: "good", "canary-promote": "good", "canary-start": "live", "canary-step": "live" };
const exact = /^[^@\s]+@v\d+$/;

export function entriesTable(rows) {
  const moved = (text) => (exact.test(text) ? versionLink(text) : text);
  return table([
    { head: t("when"), cell: (row) => when(row.at, f.time(row.at)), kind: "light" }, { head: t("actor"), cell: (row) => row.actor }, { head: t("action"), cell: (row) => badge(t(`a_${row.action}`), kinds[row.action] ?? "") },
    { head: t("subject"), cell: (row) => [row.name || f.NONE, row.alias ? h("span.soft", null, `@${row.alias}`) : null] },
    { head: t("moved"), cell: (row) => (row.before || row.after ? [row.before ? moved(row.before) : f.NONE, h("span.soft", null, " → "), row.after ? moved(row.after) : f.NONE] : f.NONE) },
    { head: t("reason"), cell: (row) => row.why || f.NONE, kind: "why" },
    { head: t("details"), cell: (row) => h("details.inline", null, h("summary", null, `#${row.id}`), h("pre.json", null, `${JSON.stringify(row.details, null, 2)}\n${row.hash}`)) },
  ], rows, { caption: t("history"), none: empty(t("none_history"), t("none_history_text")) });
}

export async function view(here) {
  const now = Object.fromEntries(KEYS.map((key) => [key, here.query.get(key) ?? ""]));
  const show = (key, value) => here.go(["history"], { ...now, [key]: value });
  const typed = (key) => h("input", { type: "search", value: now[key], spellcheck: "false", autocomplete: "off", onchange: (event) => show(key, event.target.value.trim()) });
  const { rows, more } = await get("history", { ...now, limit: 50 }, here);
  const list = h("div", { "aria-live": "polite" }, entriesTable(rows));
  let last = rows.at(-1)?.id ?? 0;
  const older = button(t("older"), async () => {
    older.disabled = true;
    try {
      const next = await get("history", { ...now, before: last, limit: 50 }, here);
      list.querySelector("tbody")?.append(...entriesTable(next.rows).querySelectorAll("tbody > tr"));
      last = next.rows.at(-1)?.id ?? last;
      older.disabled = false;
      if (!next.more) older.remove();
    } catch (error) {
      older.replaceWith(problem(error));
    }
  });
  return [
    heading(t("history"), h("p.soft", null, t("newest_first"))),
    h("form.filters", { role: "search", onsubmit: (event) => event.preventDefault() }, field(t("name"), typed("name")), field(t("alias"), typed("alias")),
      field(t("action"), choice([["", t("any")], ...ACTIONS.map((action) => [action, t(`a_${action}`)])], now.action, (value) => show("action", value))), field(t("actor"), typed("actor")),
      KEYS.some((key) => now[key]) ? button(t("clear"), () => here.go(["history"]), "quiet") : null),
    list, more ? h("p.pager", null, older) : null,
  ];
}
