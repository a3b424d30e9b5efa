// One prompt to two mixtures, and their answers side by side.

import { get, stream } from "./api.js";
import { fill, h, id } from "./dom.js";
import * as f from "./format.js";
import { button, choice, empty, field, heading } from "./parts.js";
import { t } from "./words.js";

const kept = { a: null, b: null, asked: null }; // while the page is open, another view does not lose what was set

export async function view(here) {
  const { models } = await get("models", {}, here);
  const base = models.find((model) => model.base)?.id ?? here.session.base;
  const names = models.filter((model) => !model.base).map((model) => model.id);
  const list = h("datalist", { id: id() }, names.slice(0, 500).map((name) => h("option", { value: name })));
  const [first, second] = names.filter((name) => !name.includes("@"));
  kept.a ??= first ? [{ name: first, weight: 1 }] : [];
  kept.b ??= second ? [{ name: first, weight: 0.5 }, { name: second, weight: 0.5 }] : [];
  kept.asked ??= { prompt: "", system: "", kind: "chat", max_tokens: 256, temperature: 0, seed: "", user: "" };
  const sides = [side("A", kept.a, { base, names, list }), side("B", kept.b, { base, names, list })];
  const { asked } = kept;
  const remembered = (key, control) => { control.value = asked[key]; control.addEventListener("input", () => { asked[key] = control.value; }); return control; };
  const prompt = remembered("prompt", h("textarea", { rows: 4, onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); } } }));
  const system = remembered("system", h("textarea", { rows: 1 }));
  const kind = choice([["chat", t("kind_chat")], ["completion", t("kind_completion")]], asked.kind, (value) => { asked.kind = value; });
  const numbers = { max_tokens: { min: 1, max: 4096 }, temperature: { min: 0, max: 2, step: 0.1 }, seed: { min: 0, placeholder: t("seed_hint") } };
  const inputs = Object.fromEntries(Object.entries(numbers).map(([key, more]) => [key, remembered(key, h("input", { type: "number", ...more }))]));
  const user = remembered("user", h("input", { type: "text", placeholder: t("end_user_hint"), autocomplete: "off", spellcheck: "false" }));
  const told = h("div", { role: "alert" });
  const go = h("button.primary", { type: "submit", title: t("ctrl_enter") }, t("send"));
  const stop = h("button", { type: "button", disabled: true, onclick: () => running.abort() }, t("stop"));
  let running = new AbortController();
  here.signal.addEventListener("abort", () => running.abort());

  async function send() {
    fill(told);
    if (!prompt.value.trim()) {
      fill(told, h("p.problem-line", null, t("write_prompt")));
      return prompt.focus();
    }
    running.abort();
    running = new AbortController();
    const question = {
      kind: kind.value, prompt: prompt.value, system: kind.value === "chat" ? system.value : "", max_tokens: Number(inputs.max_tokens.value) || 256, temperature: Number(inputs.temperature.value) || 0, user: user.value.trim(),
      ...(inputs.seed.value === "" ? {} : { seed: Number(inputs.seed.value) }),
    };
    const mine = running;
    [go.disabled, stop.disabled] = [true, false];
    await Promise.all(sides.map((one) => one.ask(question, mine.signal)));
    if (mine === running) [go.disabled, stop.disabled] = [false, true];
  }

  return [
    heading(t("playground")), list,
    h("form.play", { onsubmit: (event) => { event.preventDefault(); send(); } },
      h("div.play-ask", null, field(t("prompt"), prompt), field(t("system"), system),
        h("div.fields", null, field(t("kind"), kind), field(t("max_tokens"), inputs.max_tokens), field(t("temperature"), inputs.temperature), field(t("seed"), inputs.seed), field(t("end_user"), user)),
        told, h("div.actions", null, stop, go)),
      h("div.sides", null, sides.map((one) => one.element))),
  ];
}

/** What `model` says for these members: the base, a name, or a mixture. */
function mixture(members, base) {
  const found = members.filter((member) => member.name);
  if (!found.length) return base;
  if (found.length === 1 && found[0].weight === 1) return found[0].name;
  return found.map((member) => `${member.name}=${member.weight}`).join("+");
}

function side(letter, members, { base, names, list }) {
  const [rows, answer, chosen, foot] = [h("div.members"), h("div.answer", { "aria-live": "polite", "aria-busy": "false" }), h("div.chosen"), h("p.answer-foot.soft")];
  const model = h("code.model");
  const told = () => fill(model, mixture(members, base));

  function draw() {
    fill(rows, members.length ? members.map(row) : h("p.soft", null, `${t("base_alone")}: ${base}`));
    told();
  }

  function row(member) {
    const label = () => member.name || t("member");
    const name = h("input", { type: "text", value: member.name, list: list.id, "aria-label": t("member"), spellcheck: "false", autocomplete: "off", oninput: (event) => { member.name = event.target.value.trim(); told(); } });
    const slider = h("input", { type: "range", min: -1, max: 1.5, step: 0.05, value: member.weight, "aria-label": t("weight", { name: label() }) });
    const exact = h("input", { type: "number", min: -10, max: 10, step: 0.05, value: member.weight, "aria-label": t("weight", { name: label() }) });
    const set = (value) => { if (Number.isFinite(value)) { member.weight = Math.round(1e6 * value) / 1e6; told(); } };
    slider.addEventListener("input", () => { set(Number(slider.value)); exact.value = member.weight; });
    exact.addEventListener("input", () => { set(Number(exact.value)); slider.value = member.weight; });
    return h("div.member", null, name, slider, exact, h("button.quiet.icon", { type: "button", "aria-label": t("remove", { name: label() }), onclick: () => { members.splice(members.indexOf(member), 1); draw(); } }, "×"));
  }

  async function ask(question, signal) {
    const began = performance.now();
    const text = document.createTextNode("");
    let [tokens, who, first] = [0, "", 0];
    answer.setAttribute("aria-busy", "true");
    fill(answer, h("p.soft", null, t("waiting")));
    fill(foot);
    fill(chosen);
    const closing = (...more) => fill(foot, [who ? t("answered", { who }) : null, tokens ? t("tokens_n", { n: f.count(tokens) }) : null, f.seconds((performance.now() - began) / 1000), tokens > 1 ? t("rate", { n: f.number((1000 * (tokens - 1)) / (performance.now() - first), 3) }) : null, ...more].filter(Boolean).join(" · "));
    try {
      const events = stream("ask", { ...question, model: mixture(members, base) }, signal, (headers) => { who = headers.get("x-lorchestra-model") ?? base; });
      for await (const event of events) {
        if (event.error) throw new Error(event.error.message);
        if (event.end) break;
        if (event.lorchestra) fill(chosen, choiceOf(event.lorchestra));
        if (!first) { first = performance.now(); fill(answer, h("pre.text", null, text)); }
        text.appendData(event.text);
        tokens = event.tokens;
        closing();
      }
      closing();
    } catch (error) {
      if (error.name === "AbortError") closing(t("stopped_by_you"));
      else answer.append(h("p.problem-line.lines", { role: "alert" }, error.message));
      if (!first && error.name !== "AbortError") answer.firstChild?.remove();
    } finally {
      answer.setAttribute("aria-busy", "false");
    }
  }

  draw();
  fill(answer, empty(t("none_answer"), t("none_answer_text")));
  const title = id();
  return {
    ask,
    element: h("section.card.side", { "aria-labelledby": title }, h("h2", { id: title }, t("target", { side: letter })), rows,
      h("p.side-model", null, button(t("add_member"), () => { members.push({ name: names.find((name) => !members.some((one) => one.name === name)) ?? "", weight: members.length ? 0.5 : 1 }); draw(); }, "small"), model), answer, chosen, foot),
  };
}

/** What a gate made of the prompt: a coefficient for each adapter, in groups of layers where these differ, and the
    training prompts that are nearest to it. */
function choiceOf({ gate, coefficients, layers, nearest = [] }) {
  const rows = (of) => Object.entries(of).sort((one, other) => Math.abs(other[1]) - Math.abs(one[1]))
    .map(([name, value]) => h("div.coefficient", null, h("span", null, name), h("meter", { min: 0, max: 1, value: Math.min(Math.abs(value), 1), "aria-label": t("weight", { name }) }), h("span.number", null, f.number(value, 3))));
  return [
    h("p.soft", null, Object.keys(coefficients).length ? t("gate_chose", { gate }) : t("gate_chose_none", { gate })),
    layers ? Object.entries(layers).map(([group, of]) => [h("p", null, group), Object.keys(of).length ? rows(of) : h("p.soft", null, t("base_alone"))]) : rows(coefficients),
    nearest.length ? h("p.soft", null, t("nearest_prompts")) : null,
    nearest.length ? h("ul.soft", null, nearest.map((one) => h("li", null, [f.number(one.similarity, 2), one.domain, one.text ?? one.digest.slice(0, 19)].filter(Boolean).join(" · ")))) : null,
  ].flat(3).filter(Boolean);
}
