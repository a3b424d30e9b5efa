// The changes that more than one view offers, each behind its dialogue.

import { get, post } from "./api.js";
import { h } from "./dom.js";
import * as f from "./format.js";
import { check, choice, confirm, field } from "./parts.js";
import { t } from "./words.js";

const text = (value = "", more = {}) => h("input", { type: "text", value, spellcheck: "false", autocomplete: "off", ...more });

export function promote(version, alias, after) {
  const where = text(alias);
  const gates = h("textarea", { rows: 2, spellcheck: "false", class: "code" });
  const force = check(t("force"));
  confirm({
    title: t("promote_title", { version: version.reference }), text: t("promote_text"), action: t("promote"),
    fields: [field(t("alias"), where), field(t("gates"), gates, t("gates_hint")), force.element],
    run: async (why) => {
      const asked = gates.value.split(/[\n,]/).map((gate) => gate.trim()).filter(Boolean);
      await post("promote", { reference: version.reference, alias: where.value.trim(), gates: asked, force: force.box.checked, why });
      after();
    },
  });
}

export function rollback({ name, alias, reference }, after) {
  const where = text();
  confirm({
    title: t("rollback_title", { alias: `${name}@${alias}` }), text: t("rollback_text", { version: reference }), action: t("rollback"), danger: true,
    fields: [field(t("rollback_to"), where, t("rollback_hint"))],
    run: async (why) => { await post("rollback", { name, alias, to: where.value.trim(), why }); after(); },
  });
}

export function revoke(version, after) {
  const back = version.state === "revoked";
  confirm({
    title: t(back ? "reinstate_title" : "revoke_title", { version: version.reference }), text: t(back ? "reinstate_text" : "revoke_text"), action: t(back ? "reinstate" : "revoke"), danger: !back,
    run: async (why) => { await post(back ? "reinstate" : "revoke", { reference: version.reference, why }); after(); },
  });
}

const part = (input, of) => (input.value.trim() === "" ? null : Number(input.value) / of);
const figure = (value) => h("input", { type: "number", value, step: "any", min: 0, inputmode: "decimal" });

export async function start({ name, alias, reference }, after, candidate = "") {
  const { rows } = await get("versions", { name, state: "ready", limit: 200 });
  const others = rows.map((row) => row.reference).filter((other) => other !== reference);
  const which = others.length ? choice(others.map((other) => [other, other]), candidate || others[0]) : text(candidate);
  const [steps, hold] = [text("1, 5, 25, 50, 100"), text("10m")];
  const [errors, latency, score, limit, least] = [figure(1), figure(25), figure(0.05), figure(50), figure(100)];
  const end = check(t("promote_end"));
  confirm({
    title: t("start_title", { alias: `${name}@${alias}` }), text: t("start_text", { version: reference }), action: t("start_do"),
    fields: [
      field(t("candidate"), which),
      h("div.fields", null, field(t("steps"), steps), field(t("hold"), hold, t("hold_hint")), field(t("min_requests"), least)),
      h("fieldset", null, h("legend", null, t("guards"), h("span.hint", null, ` ${t("guard_hint")}`)), h("div.fields", null, field(t("g_errors"), errors), field(t("g_latency"), latency), field(t("g_score"), score), field(t("g_limit"), limit))),
      end.element,
    ],
    run: async (why) => {
      await post("canary/start", {
        name, alias, candidate: which.value.trim(), steps: steps.value.split(/[,\s]+/).filter(Boolean).map((share) => Math.round(1e4 * Number(share)) / 1e6), hold: hold.value.trim(), promote: end.box.checked,
        max_error_increase: part(errors, 100), max_latency_increase: part(latency, 100), max_score_drop: part(score, 1), max_error_rate: part(limit, 100), min_requests: Number(least.value) || 0, why,
      });
      after();
    },
  });
}

export function step(canary, after) {
  const { name, alias } = canary;
  confirm({
    title: t("step_title", { alias: `${name}@${alias}` }), text: t("step_text", { a: f.percent(canary.share), b: f.percent(canary.plan.steps[canary.step + 1]) }), action: t("step_now"),
    run: async (why) => { await post("canary/step", { name, alias, why }); after(); },
  });
}

export function hold(canary, after) {
  const { name, alias } = canary;
  const span = text(f.span(canary.plan.hold));
  confirm({
    title: t("hold_title", { alias: `${name}@${alias}` }), text: t("hold_text"), action: t("change_hold"), fields: [field(t("hold"), span, t("hold_hint"))],
    run: async (why) => { await post("canary/hold", { name, alias, hold: span.value.trim(), why }); after(); },
  });
}

export function finish(canary, after) {
  const { name, alias } = canary;
  const force = check(t("force_guard"));
  confirm({
    title: t("finish_title", { version: canary.candidate }), text: t("finish_text", { alias: `${name}@${alias}` }), action: t("promote"), fields: [force.element],
    run: async (why) => { await post("canary/promote", { name, alias, force: force.box.checked, why }); after(); },
  });
}

export function abort(canary, after) {
  const { name, alias } = canary;
  confirm({
    title: t("abort_title", { alias: `${name}@${alias}` }), text: t("abort_text", { version: canary.stable }), action: t("abort"), danger: true,
    run: async (why) => { await post("canary/abort", { name, alias, why }); after(); },
  });
}
