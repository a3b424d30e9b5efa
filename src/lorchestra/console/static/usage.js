// What each tenant used, by model, since this server began.

import { get } from "./api.js";
import { spark } from "./charts.js";
import { fill, h } from "./dom.js";
import * as f from "./format.js";
import { empty, facts, field, heading, table, when } from "./parts.js";
import { t } from "./words.js";

const EVERY = 5000;
const SUMMED = ["requests", "errors", "refused", "prompt_tokens", "generated_tokens"];

export async function view(here) {
  const first = await get("usage", {}, here);
  const search = h("input", { type: "search", placeholder: t("search_usage"), spellcheck: "false", autocomplete: "off", oninput: () => draw() });
  const place = h("div");
  let report = first;

  function draw() {
    const word = search.value.trim().toLowerCase();
    const rows = report.rows.filter((row) => !word || row.tenant.toLowerCase().includes(word) || row.model.toLowerCase().includes(word));
    const total = Object.fromEntries(SUMMED.map((key) => [key, rows.reduce((sum, row) => sum + row[key], 0)]));
    if (!report.rows.length) return void fill(place, empty(t("none_usage"), t("none_usage_text")));
    const tenants = new Map();
    for (const row of rows) tenants.set(row.tenant, [...(tenants.get(row.tenant) ?? []), row]);
    const lines = [...tenants].flatMap(([, own]) => own.map((row, k) => ({ ...row, first: k === 0 })));
    const dim = (n) => (n ? f.count(n) : h("span.soft", null, "0"));
    const hour = (tenant) => {
      const counts = report.minutes[tenant];
      return counts ? spark(counts, t("per_minute", { n: counts.reduce((sum, n) => sum + n, 0) })) : f.NONE;
    };
    fill(place,
      facts([[t("tenants"), f.count(tenants.size)], [t("requests"), f.count(total.requests)], [t("refused"), f.count(total.refused)], [t("errors"), f.count(total.errors)], [t("tokens_in"), f.count(total.prompt_tokens)], [t("tokens_out"), f.count(total.generated_tokens)]]),
      table([
        { head: t("tenant"), cell: (row) => (row.first ? row.tenant : h("span.unseen", null, row.tenant)) }, { head: t("last_hour"), cell: (row) => (row.first ? hour(row.tenant) : "") }, { head: t("model"), cell: (row) => row.model },
        { head: t("requests"), num: true, cell: (row) => f.count(row.requests) }, { head: t("refused"), num: true, cell: (row) => dim(row.refused) }, { head: t("errors"), num: true, cell: (row) => (row.errors ? h("span.worse", null, `${f.count(row.errors)} (${f.percent(row.errors / row.requests)})`) : dim(0)) },
        { head: t("tokens_in"), num: true, cell: (row) => f.count(row.prompt_tokens) }, { head: t("tokens_out"), num: true, cell: (row) => f.count(row.generated_tokens) }, { head: t("mean_time"), num: true, cell: (row) => f.seconds(row.seconds / row.requests) },
        { head: t("last"), num: true, cell: (row) => when(new Date(1000 * row.last).toISOString()) },
      ], lines, { caption: t("usage"), rowClass: (row) => (row.first ? "begins" : "") }));
  }

  draw();
  const timer = setInterval(async () => {
    if (document.hidden) return;
    try { report = await get("usage", {}, { signal: here.signal, poll: true }); draw(); } catch { /* the next one may succeed */ }
  }, EVERY);
  here.signal.addEventListener("abort", () => clearInterval(timer));
  const since = new Date(1000 * first.since).toISOString();
  return [heading(t("usage"), h("p.soft", null, t("since_start", { when: f.time(since) }))), h("form.filters", { role: "search", onsubmit: (event) => event.preventDefault() }, field(t("search"), search)), place];
}
