// Logging in with an API key.

import { post } from "./api.js";
import { fill, h } from "./dom.js";
import { field } from "./parts.js";
import { t } from "./words.js";

export function login({ brand, controls, over, entered }) {
  const key = h("input", { type: "password", autocomplete: "current-password", spellcheck: "false", required: true, name: "key", maxlength: 512 });
  const told = h("div", { role: "alert" }, over ? h("p.hint", null, t("login_over")) : null);
  const go = h("button.primary.wide", { type: "submit" }, t("login_do"));

  async function sent(event) {
    event.preventDefault();
    if (!key.value.trim()) return key.focus();
    go.disabled = true;
    fill(told);
    try {
      entered(await post("login", { key: key.value }));
    } catch (error) {
      const said = error.status === 429 ? t("login_wait", { n: error.wait || 30 }) : error.status === 401 ? t("login_wrong") : error.message;
      fill(told, h("p.problem-line", null, said));
      key.select();
    } finally {
      go.disabled = false;
    }
  }

  return h("main.login", null, h("div.login-top", null, brand, h("div.me", null, controls)),
    h("form.card", { onsubmit: sent, novalidate: true },
      h("h1", null, t("login_title")), h("p", null, t("login_text")),
      field(t("login_key"), key), told, go,
      h("p.hint", null, t("login_how")), h("pre", null, "lorchestra serve keys add ann --role operator")));
}
