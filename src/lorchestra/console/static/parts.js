// What every view is made of: tables, pages, badges, empty and loading states, the dialogue that asks for a reason.

import { fill, h, id } from "./dom.js";
import * as f from "./format.js";
import { t } from "./words.js";

export const code = (text) => h("code", null, text);
export const badge = (text, kind = "") => h(`span.badge${kind ? `.${kind}` : ""}`, null, text);
export const stateBadge = (state) => badge(t(state), { ready: "good", revoked: "bad", running: "live", promoted: "good", "rolled-back": "bad" }[state] ?? "");
export const link = (href, ...text) => h("a", { href }, ...text);
export const to = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;
export const versionLink = (reference) => link(to("versions", reference), reference);
export const when = (iso, text = f.ago(iso)) => (iso ? h("time", { datetime: iso, title: f.time(iso) }, text) : f.NONE);
export const tags = (words) => (words.length ? h("span.tags", null, words.map((word) => h("span.tag", null, word))) : f.NONE);
export const button = (text, onclick, kind = "") => h(`button${kind ? `.${kind}` : ""}`, { type: "button", onclick }, text);

/** Columns are {head, cell(row), num, key}; rows may be none, and then `none` is shown. */
export function table(columns, rows, { none, caption, rowClass } = {}) {
  if (!rows.length) return none ?? empty(t("none_found"), t("none_found_text"));
  return h("div.scroll", { tabindex: 0, role: "region", "aria-label": caption ?? "" },
    h("table", null,
      caption ? h("caption.unseen", null, caption) : null,
      h("thead", null, h("tr", null, columns.map((column) => h(`th${column.num ? ".num" : ""}`, { scope: "col" }, column.head)))),
      h("tbody", null, rows.map((row) => h("tr", { class: rowClass?.(row) || undefined }, columns.map((column, k) => {
        const kind = [column.num ? "num" : "", column.kind ?? ""].filter(Boolean).join(" ");
        return h(k === 0 && !column.plain ? "th" : "td", { class: kind || undefined, scope: k === 0 && !column.plain ? "row" : undefined }, column.cell(row));
      })))),
    ));
}

export function empty(title, text, command) {
  return h("div.empty", null, h("p.empty-title", null, title), text ? h("p", null, text) : null, command ? h("pre", null, command) : null);
}

export const loading = (text = t("loading")) => h("div.loading", { role: "status" }, h("span.dots", { "aria-hidden": "true" }, h("i"), h("i"), h("i")), text);

export function problem(error, again) {
  return h("div.problem", { role: "alert" }, h("p.empty-title", null, t("failed")), h("p.lines", null, error.message), again ? button(t("retry"), again) : null);
}

/** Show `work`'s outcome in `place`: loading, then what it made, or what went wrong. */
export async function shown(place, signal, work) {
  const waits = setTimeout(() => fill(place, loading()), 150);
  try {
    const made = await work();
    if (!signal.aborted) fill(place, made);
  } catch (error) {
    if (error.name !== "AbortError" && !signal.aborted) fill(place, problem(error, () => shown(place, signal, work)));
  } finally {
    clearTimeout(waits);
  }
}

export function pager({ offset, limit, total }, go) {
  if (total <= limit && !offset) return h("p.pager", null, t("page_of", { a: total ? 1 : 0, b: f.count(total), n: f.count(total) }));
  const last = Math.min(offset + limit, total);
  return h("nav.pager", { "aria-label": t("page_of", { a: offset + 1, b: last, n: total }) },
    h("span", null, t("page_of", { a: f.count(offset + 1), b: f.count(last), n: f.count(total) })),
    h("button", { type: "button", disabled: offset === 0, onclick: () => go(Math.max(0, offset - limit)) }, t("previous")),
    h("button", { type: "button", disabled: last >= total, onclick: () => go(offset + limit) }, t("next_page")));
}

/** A labelled control; `control` gets the id. */
export function field(label, control, hint) {
  const name = id();
  control.id = name;
  const told = hint ? id() : null;
  if (told) control.setAttribute("aria-describedby", told);
  return h("div.field", null, h("label", { for: name }, label), control, hint ? h("p.hint", { id: told }, hint) : null);
}

export function check(label, checked = false) {
  const box = h("input", { type: "checkbox", checked });
  return { box, element: h("label.check", null, box, h("span", null, label)) };
}

export function choice(options, chosen, onchange) {
  return h("select", { onchange: (event) => onchange?.(event.target.value) }, options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
}

/** A pair list: term and what it is. */
export const facts = (pairs) => h("dl.facts", null, pairs.filter(Boolean).map(([term, value]) => h("div", null, h("dt", null, term), h("dd", null, value))));

export function section(title, ...children) {
  const name = id();
  return h("section", { "aria-labelledby": name }, h("h2", { id: name }, title), ...children);
}

export function heading(title, ...more) {
  return h("header.heading", null, h("h1", { tabindex: -1 }, title), ...more);
}

let saying = 0;
function say(text) {
  const place = document.getElementById("said");
  fill(place, h("div", null, text));
  clearTimeout(saying);
  saying = setTimeout(() => fill(place), 6000);
}

/** Ask before a change: what it does, what else it needs, and why. `run(why)` does it; an error stays in the dialogue. */
export function confirm({ title, text, fields = [], action, danger = false, run }) {
  const why = h("textarea", { rows: 2, maxlength: 2000, required: true });
  const told = h("div", { role: "alert" });
  const go = h(`button${danger ? ".danger" : ".primary"}`, { type: "submit" }, action);
  const heading = id();
  const opener = document.activeElement;
  const dialog = h("dialog", { "aria-labelledby": heading, onclose: () => { dialog.remove(); opener?.focus?.(); } },
    h("form", { method: "dialog", novalidate: true, onsubmit: sent },
      h("h2", { id: heading }, title), h("p", null, text), fields, field(t("reason"), why, t("reason_hint")), told,
      h("div.actions", null, button(t("cancel"), () => dialog.close()), go)));

  async function sent(event) {
    event.preventDefault();
    if (!why.value.trim()) {
      fill(told, h("p.problem-line", null, t("reason_missing")));
      why.focus();
      return;
    }
    go.disabled = true;
    fill(told);
    try {
      await run(why.value.trim());
      dialog.close();
      say(t("done", { what: title }));
    } catch (error) {
      fill(told, h("p.problem-line.lines", null, error.message));
    } finally {
      go.disabled = false;
    }
  }

  document.body.append(dialog);
  dialog.showModal();
  (dialog.querySelector("input, select") ?? why).focus();
  return dialog;
}
