// A lineage drawn in layers, from what came first on the left. Our own small layout: longest path, then barycentres.

import { h, s } from "./dom.js";
import * as f from "./format.js";
import { to } from "./parts.js";
import { t } from "./words.js";

const [WIDE, HIGH, GAP_X, GAP_Y, PAD] = [196, 46, 76, 18, 12];

/** digest → layer: one more than the deepest parent. Circles end where they close. */
function layers(nodes, edges) {
  const parents = new Map(nodes.map((node) => [node.digest, []]));
  for (const edge of edges) parents.get(edge.child)?.push(edge.parent);
  const depth = new Map();
  const open = new Set();
  const visit = (digest) => {
    if (depth.has(digest)) return depth.get(digest);
    if (open.has(digest)) return -1;
    open.add(digest);
    const found = 1 + Math.max(-1, ...parents.get(digest).map((parent) => (parents.has(parent) ? visit(parent) : -1)));
    open.delete(digest);
    depth.set(digest, found);
    return found;
  };
  nodes.forEach((node) => visit(node.digest));
  return depth;
}

/** digest → {x, y}, and the size of the whole. */
function layout(nodes, edges) {
  const depth = layers(nodes, edges);
  const columns = [];
  for (const node of nodes) (columns[depth.get(node.digest)] ??= []).push(node.digest);
  const near = new Map(nodes.map((node) => [node.digest, []]));
  for (const edge of edges) {
    near.get(edge.child)?.push(edge.parent);
    near.get(edge.parent)?.push(edge.child);
  }
  const row = new Map();
  columns.forEach((column) => column.forEach((digest, k) => row.set(digest, k)));
  for (let sweep = 0; sweep < 6; sweep++) {
    const order = sweep % 2 ? [...columns.keys()].reverse() : [...columns.keys()];
    for (const k of order) {
      const middle = (digest) => {
        const around = near.get(digest).filter((other) => (sweep % 2 ? depth.get(other) > k : depth.get(other) < k));
        return around.length ? around.reduce((sum, other) => sum + row.get(other) - columns[depth.get(other)].length / 2, 0) / around.length : row.get(digest) - columns[k].length / 2;
      };
      const weight = new Map(columns[k].map((digest) => [digest, middle(digest)]));
      columns[k].sort((a, b) => weight.get(a) - weight.get(b));
      columns[k].forEach((digest, place) => row.set(digest, place));
    }
  }
  const tallest = Math.max(...columns.map((column) => column.length));
  const height = 2 * PAD + tallest * (HIGH + GAP_Y) - GAP_Y;
  const places = new Map();
  columns.forEach((column, k) => column.forEach((digest, place) => {
    const top = (height - column.length * (HIGH + GAP_Y) + GAP_Y) / 2;
    places.set(digest, { x: PAD + k * (WIDE + GAP_X), y: top + place * (HIGH + GAP_Y) });
  }));
  return { places, width: 2 * PAD + columns.length * (WIDE + GAP_X) - GAP_X, height };
}

const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

export function lineage({ nodes, edges, centre, total }, name) {
  const { places, width, height } = layout(nodes, edges);
  const met = (end, digest) => edges.filter((edge) => edge[end] === digest).length;
  const drawn = edges.filter((edge) => places.has(edge.child) && places.has(edge.parent)).map((edge) => {
    const [a, b] = [places.get(edge.parent), places.get(edge.child)];
    const [x1, y1, x2, y2] = [a.x + WIDE, a.y + HIGH / 2, b.x, b.y + HIGH / 2];
    const bend = Math.max(24, Math.abs(x2 - x1) / 2);
    return s("g", { class: `edge ${edge.kind}` },
      s("path", { d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2 - 6} ${y2}` }), s("path", { class: "head", d: `M${x2} ${y2}l-7 -3.6v7.2z` }),
      met("parent", edge.parent) <= met("child", edge.child) // where fewer edges meet there is room for a number
        ? s("text", { x: x1 + 7, y: y1 + (y2 < y1 ? 14 : -5) }, f.number(edge.coefficient, 3)) : s("text", { x: x2 - 12, y: y2 - 5, "text-anchor": "end" }, f.number(edge.coefficient, 3)));
  });
  const boxes = nodes.map((node) => {
    const { x, y } = places.get(node.digest);
    const kind = `node${node.digest === centre ? " here" : ""}${node.held ? "" : " away"}${node.state === "revoked" ? " revoked" : ""}`;
    const inside = [s("title", null, `${node.name}\n${node.digest}`), s("rect", { x, y, width: WIDE, height: HIGH, rx: 5 }),
      s("text", { x: x + 10, y: y + 19 }, cut(node.name || "?", 26)), s("text", { class: "soft", x: x + 10, y: y + 35 }, `${node.digest.slice(7, 19)}${node.state === "revoked" ? ` · ${t("revoked")}` : ""}`)];
    return node.held ? s("a", { href: to("versions", node.name), class: kind }, inside) : s("g", { class: kind }, inside);
  });
  return h("figure.graph", null,
    h("div.scroll", { tabindex: 0, role: "region", "aria-label": t("lineage") },
      s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": t("graph_label", { name, n: total }) }, drawn, boxes)),
    h("figcaption", null, total > nodes.length ? `${t("graph_part", { a: nodes.length, b: f.count(total) })} · ` : "", t("graph_key")));
}
