// Without this script the page lacks nothing but the values under the pointer.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
document.querySelectorAll("svg[data-frame]").forEach((svg) => {
  const { x: [x0, x1, left, right], y: [y0, y1, floor, top], log, name, places } = JSON.parse(svg.dataset.frame);
  const value = (p) => {
    const share = (p - floor) / (top - floor);
    return (log ? y0 * Math.pow(y1 / y0, share) : y0 + share * (y1 - y0)).toPrecision(3);
  };
  const curves = [...svg.querySelectorAll("polyline")].filter((c) => !c.classList.contains("faint"));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const near = curves.map((c) => [...c.points].reduce((a, b) => (Math.abs(b.x - at) < Math.abs(a.x - at) ? b : a)));
    const step = places
      ? places.reduce((a, b) => (Math.abs(b[0] - near[0].x) < Math.abs(a[0] - near[0].x) ? b : a))[1]
      : Math.round(x0 + ((near[0].x - left) / (right - left)) * (x1 - x0));
    tip.textContent = [`${name} ${step}`, ...curves.map((c, k) => `${c.dataset.name} ${value(near[k].y)}`)].join("\n");
    tip.hidden = false;
    tip.style.left = `${Math.min(event.pageX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.pageY + 14}px`;
  });
  svg.addEventListener("pointerleave", () => (tip.hidden = true));
});
