// Elements from values. Every text becomes a text node; there is no way from here to markup.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  put(element, children);
  return element;
}

function put(element, children) {
  for (const child of children) {
    if (child === undefined || child === null || child === false) continue;
    if (Array.isArray(child)) put(element, child);
    else element.append(child instanceof Node ? child : String(child));
  }
}

/** An HTML element: name, properties (on… are listeners), children. A name may bring classes: "div.card.wide". */
export function h(name, props, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  return filled(element, props, children);
}

/** An SVG element. */
export function s(name, props, ...children) {
  return filled(document.createElementNS(SVG, name), props, children);
}

/** Put children in place of what was there. */
export function fill(element, ...children) {
  element.replaceChildren();
  put(element, children);
  return element;
}

let counter = 0;
export const id = () => `x${++counter}`;
