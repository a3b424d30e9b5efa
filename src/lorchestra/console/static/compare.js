// Two versions side by side.

import { metric } from "./adapters.js";
import { get } from "./api.js";
import { part } from "./charts.js";
import { fill, h } from "./dom.js";
import * as f from "./format.js";
import { badge, button, code, empty, facts, field, heading, loading, problem, section, table, versionLink } from "./parts.js";
import { leaf } from "./version.js";
import { t } from "./words.js";

const MODULES = 20;

export async function view(here) {
  const [before, after] = ["before", "after"].map((key) => here.query.get(key) ?? "");
  const [one, two] = [before, after].map((value) => h("input", { type: "text", value, required: true, placeholder: "clinic@v1", spellcheck: "false", autocomplete: "off" }));
  const show = (a, b) => here.go(["compare"], { before: a, after: b });
  const place = h("div", { "aria-live": "polite" });
  const form = h("form.filters.even", { onsubmit: (event) => { event.preventDefault(); if (one.value.trim() && two.value.trim()) show(one.value.trim(), two.value.trim()); } },
    field(t("before"), one), field(t("after"), two), h("button.primary", { type: "submit" }, t("compare_do")), before && after ? button(t("swap"), () => show(after, before), "quiet") : null);
  if (!before || !after) fill(place, empty(t("compare_pick"), t("compare_pick_text")));
  else draw();

  async function draw() {
    fill(place, loading(t("compare_slow")));
    try {
      const found = await get("compare", { before, after }, here);
      if (!here.signal.aborted) fill(place, compared(found));
    } catch (error) {
      if (error.name !== "AbortError") fill(place, problem(error, draw));
    }
  }

  return [heading(t("compare_title"), h("p.soft", null, t("compare_text"))), form, place];
}

const verdicts = { better: "good", worse: "bad" };

function compared(found) {
  const [a, b] = [found.before, found.after];
  const { distance } = found;
  const changes = (rows) => table([
    { head: "", cell: (row) => code(row.key) }, { head: a, cell: (row) => leaf(row.before) }, { head: b, cell: (row) => leaf(row.after) },
  ], rows, { caption: t("change"), none: empty(t("no_difference")) });
  const metrics = table([
    { head: t("metric"), cell: (row) => row.key }, { head: a, num: true, cell: (row) => metric(row.before) }, { head: b, num: true, cell: (row) => metric(row.after) },
    { head: t("change"), num: true, cell: (row) => (row.change === null ? f.NONE : `${row.change > 0 ? "+" : ""}${f.number(row.change)}`) }, { head: t("verdict"), cell: (row) => badge(t(`v_${row.verdict}`), verdicts[row.verdict] ?? "") },
  ], found.metrics, { caption: t("metrics"), none: empty(t("none_metrics"), t("none_metrics_text")) });
  const most = Math.max(...distance.modules.map((module) => module.difference), 1e-30);
  const modules = table([
    { head: t("module"), cell: (row) => code(row.path) }, { head: t("relative"), num: true, cell: (row) => f.fixed(row.relative, 3) }, { head: t("cosine"), num: true, cell: (row) => f.fixed(row.cosine, 3) },
    { head: a, num: true, cell: (row) => f.number(row.norms[0]) }, { head: b, num: true, cell: (row) => f.number(row.norms[1]) },
    { head: "", cell: (row) => part(row.difference / most) },
  ], distance.modules.slice(0, MODULES), { caption: t("distance"), none: empty(t("no_difference")) });
  return [
    h("p.pair", null, versionLink(a), h("span.soft", null, " → "), versionLink(b), found.same ? badge(t("same_weights"), "good") : null),
    section(t("metrics"), metrics),
    section(t("distance"), facts([[t("relative"), f.fixed(distance.relative, 3)], [t("cosine"), f.fixed(distance.cosine, 3)], [t("norms"), `${f.number(distance.norms[0])} · ${f.number(distance.norms[1])}`]]), modules,
      distance.modules.length > MODULES ? h("p.soft", null, t("other_modules", { n: f.count(distance.modules.length - MODULES) })) : null),
    h("div.columns", null, section(t("settings"), changes(found.settings)), section(t("data"), changes(found.data))),
    h("div.columns", null, section(t("lineage"), changes(found.lineage)), section(t("base"), changes([...found.base, ...found.serving, ...found.tools]))),
  ];
}
