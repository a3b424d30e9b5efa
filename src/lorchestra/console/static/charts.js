// Small drawings: intervals, bars, shares, a line of minutes. Widths are the viewBox's; colours are the style sheet's.

import { h, s } from "./dom.js";
import * as f from "./format.js";

/** An interval on an axis that it shares with others, with a mark (what is allowed, or zero). */
export function strip({ value, low, high, mark, span, kind, label }) {
  const [width, height, pad] = [160, 18, 6];
  const x = (v) => pad + ((Math.min(Math.max(v, span[0]), span[1]) - span[0]) / (span[1] - span[0] || 1)) * (width - 2 * pad);
  const [from, until] = [low ?? span[0], high ?? span[1]];
  return s("svg", { class: `strip ${kind ?? ""}`, viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label ?? "" },
    s("line", { class: "axis", x1: pad, x2: width - pad, y1: height / 2, y2: height / 2 }),
    mark === undefined || mark === null ? null : s("line", { class: "mark", x1: x(mark), x2: x(mark), y1: 2, y2: height - 2 }),
    s("line", { class: "whisker", x1: x(from), x2: x(until), y1: height / 2, y2: height / 2 }),
    value === null || value === undefined ? null : s("circle", { class: "estimate", cx: x(value), cy: height / 2, r: 3.4 }));
}

/** A span that shows all of these finite numbers with some room. */
export function spanOf(values) {
  const finite = values.filter((v) => Number.isFinite(v));
  if (!finite.length) return [0, 1];
  const [low, high] = [Math.min(...finite), Math.max(...finite)];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low - room, high + room];
}

/** A part of one, as a bar. */
export const part = (value) => s("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, s("rect", { class: "track", width: 100, height: 10 }), s("rect", { class: "fill", width: 100 * value, height: 10 }));

/** Signed bars from a common zero: {label, value, href}. */
export function bars(rows) {
  const most = Math.max(...rows.map((row) => Math.abs(row.value)), 1e-12);
  const negative = rows.some((row) => row.value < 0);
  const zero = negative ? 50 : 0;
  const reach = negative ? 50 : 100;
  return h("ul.bars", null, rows.map((row) => {
    const length = (Math.abs(row.value) / most) * reach;
    const begin = row.value < 0 ? zero - length : zero;
    return h("li", null, h("span.bar-label", { title: row.label }, row.href ? h("a", { href: row.href }, row.label) : row.label),
      s("svg", { class: `bar ${row.value < 0 ? "negative" : ""}`, viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
        s("rect", { class: "track", x: 0, y: 0, width: 100, height: 10 }), s("rect", { class: "fill", x: begin, y: 0, width: Math.max(length, 0.4), height: 10 })),
      h("span.num", null, f.number(row.value)));
  }));
}

/** Stable and candidate, with the steps that are to come as marks. */
export function split(share, steps, names) {
  const part = 100 * share;
  const told = `${names.stable} ${f.percent(1 - share)}, ${names.candidate} ${f.percent(share)}`;
  return h("div.split", { role: "img", "aria-label": told },
    h("div.split-names", null, h("span.arm.candidate", null, names.candidate, " ", h("b", null, f.percent(share))), h("span.arm.stable", null, names.stable, " ", h("b", null, f.percent(Math.round(1e6 * (1 - share)) / 1e6)))),
    s("svg", { viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" },
      s("rect", { class: "stable", x: 0, y: 0, width: 100, height: 12 }), s("rect", { class: "candidate", x: 0, y: 0, width: part, height: 12 }),
      steps.filter((one) => one < 1).map((one) => s("line", { class: one <= share ? "past" : "ahead", x1: 100 * one, x2: 100 * one, y1: 0, y2: 12 }))));
}

/** Counts of the last minutes. */
export function spark(counts, label) {
  const most = Math.max(...counts, 1);
  return s("svg", { class: "spark", viewBox: `0 0 ${counts.length} 20`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    s("line", { class: "axis", x1: 0, x2: counts.length, y1: 19.5, y2: 19.5 }),
    counts.map((n, k) => (n ? s("rect", { x: k + 0.1, y: 19 - (18 * n) / most, width: 0.8, height: (18 * n) / most }) : null)));
}
