// One version: what it is, what was measured, where it came from, what happened to it.

import { get } from "./api.js";
import * as changes from "./changes.js";
import { bars } from "./charts.js";
import { h } from "./dom.js";
import * as f from "./format.js";
import { lineage } from "./graph.js";
import { entriesTable } from "./history.js";
import { badge, button, code, empty, facts, heading, section, shown, stateBadge, table, tags, to, when } from "./parts.js";
import { t } from "./words.js";

export async function view(here) {
  const reference = here.parts[0] ?? "";
  const version = await get("version", { reference }, here);
  const { manifest } = version;
  const operates = here.session.role === "operator";
  const graph = h("div");
  const past = h("div");
  shown(graph, here.signal, async () => {
    const found = await get("lineage", { reference: version.reference }, here);
    return found.edges.length ? lineage(found, version.reference) : empty(t("none_lineage"), t("none_lineage_text"));
  });
  shown(past, here.signal, async () => entriesTable((await get("history", { name: version.name, reference: version.reference, limit: 100 }, here)).rows));
  const act = operates ? h("p.actions", null,
    version.state === "ready" ? button(t("promote"), () => changes.promote(version, "production", here.again), "primary") : null,
    button(t(version.state === "revoked" ? "reinstate" : "revoke"), () => changes.revoke(version, here.again), version.state === "revoked" ? "" : "danger-quiet")) : null;
  const kind = { stage: t("stage"), fusion: t("fusion_kind"), foreign: t("foreign") }[version.made_by] ?? version.made_by;
  return [
    heading([h("a.crumb", { href: to("adapters") }, t("adapters")), " / ", h("a.crumb", { href: to("adapters", version.name) }, version.name), " / ", `v${version.number}`], stateBadge(version.state), version.aliases.map((word) => badge(word, "live")), act),
    version.revoked ? h("div.problem", null, h("p.empty-title", null, t("revoked")), h("p.lines", null, version.revoked.why), h("p.soft", null, when(version.revoked.at), " · ", version.revoked.by)) : null,
    version.note ? h("p.lead.lines", null, version.note) : null,
    facts([
      [t("made_by"), [kind, version.stage ? ` · ${version.stage}` : "", version.task ? ` · ${version.task}` : ""]], [t("base"), version.base || f.NONE], [t("rank"), f.rank(version.ranks)], [t("parameters"), f.count(version.parameters)],
      [t("size"), f.bytes(version.bytes)], [t("tags"), tags(version.tags)], [t("created"), [when(version.created, f.time(version.created)), " · ", version.created_by]], [t("digest"), code(f.short(version.digest))],
    ]),
    section(t("metrics"), measured(manifest.metrics)),
    h("div.columns", null,
      section(t("fusion"), weights(manifest)),
      section(t("data"), pairs(manifest.data, t("none_data"), (digest) => code(f.short(digest))))),
    section(t("lineage"), graph),
    h("div.columns", null, section(t("settings"), pairs(flat(manifest.settings), t("none_settings"))), section(t("tools"), pairs(manifest.tools, t("none_tools")))),
    section(t("files"), table([{ head: t("path"), cell: (row) => code(row.path) }, { head: t("size"), num: true, cell: (row) => f.bytes(row.size) }, { head: t("digest"), cell: (row) => h("code", { title: row.sha256 }, f.short(row.sha256)) }],
      Object.entries(manifest.files).map(([path, entry]) => ({ path, ...entry })), { caption: t("files") })),
    h("section", null, folded(`${t("modules")} · ${f.count(version.modules.length)}`, () => table([{ head: t("path"), cell: (row) => code(row.path) }, { head: t("rank"), num: true, cell: (row) => row.rank }, { head: t("scale"), num: true, cell: (row) => f.number(row.scale) }], version.modules, { caption: t("modules") })),
      folded(t("recipe"), () => h("pre.json", null, JSON.stringify(manifest.recipe, null, 2))), folded(t("manifest"), () => [h("p.soft", null, code(version.manifest_digest)), h("pre.json", null, JSON.stringify(manifest, null, 2))])),
    section(t("history"), past),
  ];
}

/** Opened when it is asked for: a manifest may be long. */
function folded(title, make) {
  const inside = h("div");
  return h("details", { ontoggle: (event) => { if (event.target.open && !inside.childNodes.length) inside.append(...[make()].flat()); } }, h("summary", null, title), inside);
}

function measured(metrics) {
  const rows = Object.entries(metrics).map(([name, found]) => ({ name, ...found }));
  return table([
    { head: t("metric"), cell: (row) => row.name }, { head: t("value"), num: true, cell: (row) => h("b", null, f.measured(row).value) }, { head: t("interval"), num: true, cell: (row) => f.measured(row).interval || f.NONE },
    { head: t("better"), cell: (row) => t(row.better) }, { head: t("items"), num: true, cell: (row) => (row.n === null ? f.NONE : f.count(row.n)) }, { head: t("split"), cell: (row) => row.split || f.NONE },
    { head: t("digest"), cell: (row) => (row.sealed ? code(f.short(row.sealed)) : f.NONE) },
  ], rows, { caption: t("metrics"), none: empty(t("none_metrics"), t("none_metrics_text")) });
}

function weights(manifest) {
  const drawn = (entries) => bars(entries.map((entry) => ({ label: entry.name, value: entry.coefficient })));
  if (!manifest.parents.length && !manifest.context.length) return empty(t("none_fusion"), t("none_fusion_text"));
  return [
    manifest.parents.length ? [h("p.soft", null, t("weights_of")), drawn(manifest.parents)] : null,
    manifest.context.length ? [h("p.soft", null, t("context_of")), drawn(manifest.context)] : null,
  ];
}

/** Leaves of nested values: lora.rank → 16. */
function flat(value, path = "", found = {}) {
  if (value !== null && typeof value === "object" && Object.keys(value).length) for (const [key, inner] of Object.entries(value)) flat(inner, path ? `${path}.${key}` : key, found);
  else if (path) found[path] = value === null ? "null" : typeof value === "object" ? JSON.stringify(value) : value;
  return found;
}

export const leaf = (value) => (value === null || value === undefined ? f.NONE : typeof value === "number" ? f.number(value, 6) : String(value));

function pairs(values, none, draw = leaf) {
  const rows = Object.entries(values ?? {});
  return rows.length ? h("div.scroll", { tabindex: 0 }, h("table.pairs", null, h("tbody", null, rows.map(([key, value]) => h("tr", null, h("th", { scope: "row" }, key), h("td", null, draw(value))))))) : empty(none);
}
