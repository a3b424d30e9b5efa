// Numbers, times and sizes as a reader of the chosen language writes them.

import { language, t } from "./words.js";

const locale = () => (language() === "zh" ? "zh-CN" : "en-GB");
export const NONE = "–";

/** A measured number: four significant digits, thousands parted. */
export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const options = Math.abs(value) >= 10000 || Number.isInteger(value) ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: digits };
  return value.toLocaleString(locale(), options).replace("-", "−");
}

export const count = (value) => (value ?? 0).toLocaleString(locale());
export const percent = (value, digits = 1) => value === null || value === undefined ? NONE : `${(100 * value).toLocaleString(locale(), { maximumFractionDigits: digits }).replace("-", "−")} %`;
export const seconds = (value) => (value === null || value === undefined ? NONE : value < 1 ? `${number(1000 * value, 3)} ms` : `${number(value, 3)} s`);

/** So many decimals, always. */
export const fixed = (value, digits) => (value === null || value === undefined || !Number.isFinite(value) ? NONE : value.toLocaleString(locale(), { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace("-", "−"));

/** A metric's value and interval, with as many decimals as the interval is worth: two of its width. */
export function measured({ value, low, high }) {
  if (low === null || high === null || !(high > low)) return { value: number(value), interval: low === null && high === null ? "" : `[${low === null ? "−∞" : number(low)}, ${high === null ? "∞" : number(high)}]` };
  const digits = Math.min(Math.max(1 - Math.floor(Math.log10(high - low)), 0), 6);
  return { value: fixed(value, digits), interval: `[${fixed(low, digits)}, ${fixed(high, digits)}]` };
}

/** A guard's difference, in its own form. */
export function difference(value, form, none = NONE) {
  if (value === null || value === undefined) return none;
  if (form === "points") return t("points", { n: (100 * value).toFixed(2).replace("-", "−") });
  if (form === "percent") return `${(100 * value).toFixed(1).replace("-", "−")} %`;
  return value.toFixed(3).replace("-", "−");
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let k = 0;
  while (value >= 1000 && k < units.length - 1) { value /= 1000; k++; }
  return `${value.toLocaleString(locale(), { maximumFractionDigits: value < 10 && k ? 1 : 0 })} ${units[k]}`;
}

export const time = (iso) => (iso ? new Date(iso).toLocaleString(locale(), { year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit", second: "2-digit" }) : NONE);

/** Three minutes ago. */
export function ago(iso) {
  const past = (new Date(iso).getTime() - Date.now()) / 1000;
  const relative = new Intl.RelativeTimeFormat(locale(), { numeric: "auto", style: "short" });
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (Math.abs(past) >= size) return relative.format(Math.trunc(past / size), unit);
  }
  return relative.format(Math.trunc(past), "second");
}

/** 600 → 10m: as the server reads it. */
export function span(total) {
  let rest = Math.max(0, Math.ceil(total));
  let found = "";
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]]) {
    if (rest >= size) { found += `${Math.floor(rest / size)}${unit}`; rest %= size; }
  }
  return found || "0s";
}

export const short = (digest) => (digest ? digest.slice(0, 19) : NONE);
export const rank = (ranks) => (ranks.length > 1 ? `${ranks[0]}–${ranks.at(-1)}` : ranks.length ? String(ranks[0]) : NONE);
