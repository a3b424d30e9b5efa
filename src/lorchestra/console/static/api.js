// The server's side of the page. A change carries the session's token; an answer that is none is an Error with words.

import { t } from "./words.js";

let token = "";
export const remember = (session) => { token = session?.csrf ?? ""; };

export class Refused extends Error {
  constructor(message, status, code, wait) {
    super(message);
    Object.assign(this, { status, code, wait });
  }
}

async function asked(path, options) {
  let response;
  try {
    response = await fetch(`api/${path}`, { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(t("unreachable"), 0, "network");
  }
  if (response.ok) return response;
  let said = {};
  try { said = (await response.json()).error ?? {}; } catch { /* the status has to do */ }
  const error = new Refused(said.message ?? `HTTP ${response.status}`, response.status, said.code, Number(response.headers.get("retry-after")) || 0);
  if (error.status === 401 && path !== "login" && path !== "session") window.dispatchEvent(new CustomEvent("logged-out"));
  throw error;
}

/** `params` without what is empty; `poll`: nobody asked, the page did by itself. */
export async function get(path, params = {}, { signal, poll } = {}) {
  const query = new URLSearchParams(Object.entries(params).filter(([, value]) => value !== "" && value !== undefined && value !== null && value !== 0));
  const headers = poll ? { "x-lorchestra-poll": "1" } : {};
  const response = await asked(`${path}${query.size ? `?${query}` : ""}`, { signal, headers });
  return response.json();
}

const sending = (body, signal) => ({ method: "POST", body: JSON.stringify(body), signal, headers: { "content-type": "application/json", "x-lorchestra-csrf": token } });

export async function post(path, body = {}) {
  return (await asked(path, sending(body))).json();
}

/** Events of a streamed answer, one after the other; `began` is called with the response's headers. */
export async function* stream(path, body, signal, began) {
  const response = await asked(path, sending(body, signal));
  began(response.headers);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  } finally {
    reader.cancel().catch(() => {}); // it is over, or nobody listens any more
  }
}
