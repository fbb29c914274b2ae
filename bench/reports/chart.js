// Curves with exact values under pointer, finger and arrow keys. Plain SVG; what is drawn comes from the page's own data.
"use strict";

function node(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "polyline"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// As the tables print: four significant digits at least, whole numbers below ten million in full.
function number(value) {
  if (Math.abs(value) >= 1e7) return value.toExponential(3).replace("e+", "e");
  const digits = Math.abs(value) >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 4 };
  return value.toLocaleString("en-US", digits);
}

// The outlines of matplotlib's markers about a point, so that page and figures agree.
function outline(marker, x, y, r = 5) {
  const close = (...corners) => `M${corners.map(([a, b]) => `${x + a * r},${y + b * r}`).join("L")}Z`;
  const t = 0.35;
  const plus = [[-t, -1], [t, -1], [t, -t], [1, -t], [1, t], [t, t], [t, 1], [-t, 1], [-t, t], [-1, t], [-1, -t], [-t, -t]];
  if (marker === "s") return close([-0.85, -0.85], [0.85, -0.85], [0.85, 0.85], [-0.85, 0.85]);
  if (marker === "^") return close([0, -1], [1, 0.85], [-1, 0.85]);
  if (marker === "v") return close([0, 1], [1, -0.85], [-1, -0.85]);
  if (marker === "D") return close([0, -1.1], [1.1, 0], [0, 1.1], [-1.1, 0]);
  if (marker === "P") return close(...plus);
  if (marker === "X") return close(...plus.map(([a, b]) => [(a - b) * 0.75, (a + b) * 0.75]));
  return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`;
}

// Values to pixels from..to. On a log axis what is not positive stands at the lower end.
function scale(values, log, from, to) {
  const known = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  let [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [1, 10];
  const given = high > low ? 0.05 : 0.5;
  if (log) {
    const room = (high / low) ** given * (high > low ? 1 : 2);
    [low, high] = [low / room, high * room];
  } else {
    const room = (high - low || Math.abs(high) || 1) * given;
    [low, high] = [low - room, high + room];
  }
  const f = log ? Math.log10 : (value) => value;
  const place = (value) => from + ((f(log ? Math.max(value, low) : value) - f(low)) / (f(high) - f(low))) * (to - from);
  return { place, ticks: (log && logTicks(low, high)) || linearTicks(low, high) };
}

function linearTicks(low, high) {
  const rough = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, k) => (first + k) * step);
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    ticks.push(...[1, 2, 3, 5].map((digit) => Number(`${digit}e${power}`)));
  }
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.length > 2 ? inside : null; // an axis of less than half a decade: even ticks tell more
}

// Fills `box`. quantities: [{name, title}]; axes: {field: title}; curves(quantity, field) -> a list of
// {label, colour, marker, dash, noisy, points: [{x, y, ci, open, smooth, brief, lines}]}. lines: all that a point says,
// brief: what is said of it beside another curve's. Points of a noisy curve have a smooth value, and no marker.
function chart(box, name, quantities, axes, curves) {
  const state = { quantity: quantities[0], field: Object.keys(axes)[0], hidden: new Set(), at: null };
  const controls = node("div", { class: "controls" });
  const plot = node("div", { class: "plot" });
  const tip = node("div", { class: "tip", role: "status", hidden: "" });
  const hint = node("p", { class: "hint soft" }, "Touch a point for its exact values.");
  const picture = node("svg", { tabindex: "0", role: "application", "aria-label": `${name}: arrow keys go from point to point` });
  plot.append(picture, tip, hint);
  box.append(controls, plot);
  let shown = []; // {curve, k, x, y} in pixels of every visible point, by curve

  function choose(label, options, chosen) {
    const select = node("select", {}, ...options.map(([value, title]) => node("option", { value }, title)));
    select.addEventListener("change", () => chosen(select.value));
    controls.append(node("label", {}, `${label} `, select));
  }
  if (quantities.length > 1) {
    choose("show", quantities.map((one, k) => [k, one.title]), (k) => { state.quantity = quantities[k]; guess(); draw(); });
  }
  choose("over", Object.entries(axes), (field) => { state.field = field; guess(); draw(); });
  const logs = ["x", "y"].map((axis) => {
    const tick = node("input", { type: "checkbox" });
    tick.addEventListener("change", draw);
    controls.append(node("label", {}, tick, ` log ${axis}`));
    return tick;
  });
  const legend = node("div", { class: "legend" });
  box.insertBefore(legend, plot);
  for (const curve of curves(state.quantity, state.field)) {
    const key = node("svg", { width: 34, height: 12, "aria-hidden": "true" },
      node("line", { x1: 1, x2: 33, y1: 6, y2: 6, stroke: curve.colour, "stroke-width": 2, "stroke-dasharray": curve.dash }),
      ...(curve.noisy ? [] : [node("path", { d: outline(curve.marker, 17, 6, 4.5), fill: curve.colour })]));
    const button = node("button", { type: "button", "aria-pressed": "true" }, key, ` ${curve.label}`);
    button.addEventListener("click", () => {
      const hide = !state.hidden.delete(curve.label);
      if (hide) state.hidden.add(curve.label);
      button.setAttribute("aria-pressed", String(!hide));
      draw();
    });
    legend.append(button);
  }

  // Log axes where values are positive and far apart, as in the figures.
  function guess() {
    const points = curves(state.quantity, state.field).flatMap((curve) => curve.points).filter((p) => Number.isFinite(p.y));
    const spread = (values) => Math.max(...values) / Math.min(...values);
    const paid = points.map((p) => p.x).filter((x) => x > 0);
    logs[0].checked = points.length < 100 && paid.length > 1 && spread(paid) > 3.9;
    logs[1].checked = points.every((p) => p.y > 0) && spread(points.map((p) => p.y)) > 4;
  }

  function draw() {
    show(null);
    const [width, height] = [Math.max(plot.clientWidth, 240), Math.max(260, Math.min(460, plot.clientWidth * 0.55))];
    const visible = curves(state.quantity, state.field).filter((curve) => !state.hidden.has(curve.label));
    const points = visible.flatMap((curve) => curve.points.filter((p) => Number.isFinite(p.y)));
    const direct = width > 620 && visible.length <= 4;
    const [left, right, top, bottom] = [56, width - (direct ? 110 : 14), 12, height - 46];
    const [logX, logY] = logs.map((tick) => tick.checked);
    const least = Math.min(...points.map((p) => p.x).filter((x) => x > 0)) / 2; // where untrained weights stand
    const x = scale(points.map((p) => (logX && p.x <= 0 ? least : p.x)), logX, left, right);
    const y = scale(points.flatMap((p) => [p.y - (p.ci || 0), p.y, p.y + (p.ci || 0)]), logY, bottom, top);
    const at = (p) => [x.place(logX && p.x <= 0 ? least : p.x), y.place(p.y)];
    picture.replaceChildren();
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.setAttribute("height", height);
    const put = (name, attributes, ...text) => picture.appendChild(node(name, attributes, ...text));
    let last = -Infinity;
    for (const tick of x.ticks) {
      const place = x.place(tick);
      put("line", { class: "grid", x1: place, x2: place, y1: top, y2: bottom });
      if (place - last > 46) put("text", { x: (last = place), y: bottom + 16, "text-anchor": "middle" }, number(tick));
    }
    last = Infinity;
    for (const tick of y.ticks) {
      const place = y.place(tick);
      put("line", { class: "grid", x1: left, x2: right, y1: place, y2: place });
      if (last - place > 14) put("text", { x: left - 6, y: (last = place) + 4, "text-anchor": "end" }, number(tick));
    }
    put("text", { x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, axes[state.field]);
    const untrained = points.find((p) => logX && p.x <= 0);
    if (untrained) {
      const high = at(untrained)[1] < (top + bottom) / 2;
      put("text", { x: x.place(least), y: high ? bottom - 6 : top + 10, "text-anchor": "middle" }, "untrained");
    }
    shown = visible.map(() => []);
    const ends = [];
    visible.forEach((curve, c) => {
      const known = curve.points.filter((p) => Number.isFinite(p.y));
      const way = (list) => list.map((p) => at(p).join()).join(" ");
      const stroke = { fill: "none", stroke: curve.colour };
      if (curve.noisy) {
        put("polyline", { ...stroke, points: way(known), opacity: 0.45 });
        put("polyline", { ...stroke, points: way(known.map((p) => ({ x: p.x, y: p.smooth }))), "stroke-width": 2.2, "stroke-dasharray": curve.dash });
      } else {
        const before = known.filter((p) => p.open).length; // untrained points come first
        put("polyline", { ...stroke, points: way(known.slice(0, before + 1)), "stroke-dasharray": "1 3" });
        put("polyline", { ...stroke, points: way(known.slice(before)), "stroke-width": 2, "stroke-dasharray": curve.dash });
      }
      known.forEach((p, k) => {
        const [px, py] = at(p);
        if (p.ci) put("path", { ...stroke, d: `M${px - 4},${y.place(p.y + p.ci)}h8m-4,0V${y.place(p.y - p.ci)}m-4,0h8` });
        if (!curve.noisy) put("path", { class: "point", d: outline(curve.marker, px, py), stroke: curve.colour, fill: p.open ? "var(--back)" : curve.colour });
        shown[c].push({ curve: c, k, x: px, y: py, point: p, label: curve.label });
      });
      const end = known.at(-1);
      if (end) ends.push([y.place(end.smooth ?? end.y), at(end)[0], curve]);
    });
    let lowest = -Infinity;
    for (const [place, end, curve] of direct ? ends.sort((a, b) => a[0] - b[0]) : []) {
      lowest = Math.max(place, lowest + 15);
      put("text", { class: "name", x: end + 10, y: lowest + 4, style: `--own:${curve.colour}` }, curve.label);
    }
  }

  function show(spot) {
    state.at = spot;
    tip.hidden = !spot;
    hint.hidden = Boolean(spot);
    picture.querySelector(".ring")?.remove();
    if (!spot) return;
    picture.append(node("path", { class: "ring", d: outline("o", spot.x, spot.y, 9) }));
    const others = shown.filter((list, c) => c !== spot.curve && list.length).map((list) => nearest(spot.x, spot.y, list, 0));
    const beside = others.filter((other) => Math.abs(other.x - spot.x) < 12).map((other) => `${other.label}: ${other.point.brief}`);
    const lines = [...spot.point.lines, ...(beside.length ? ["beside it:", ...beside] : [])];
    tip.replaceChildren(node("strong", {}, spot.label), ...lines.map((line) => node("div", {}, line)));
    const room = plot.clientWidth - tip.offsetWidth;
    const left = spot.x + 16 <= room ? spot.x + 16 : spot.x - tip.offsetWidth - 16;
    tip.style.left = `${Math.max(0, Math.min(left, room))}px`;
    tip.style.top = `${left >= 0 ? Math.max(0, spot.y - tip.offsetHeight / 2) : spot.y + 16}px`;
  }

  function nearest(x, y, among, weight = 1) {
    const far = (spot) => (spot.x - x) ** 2 + weight * (spot.y - y) ** 2;
    return among.reduce((best, spot) => (best && far(best) <= far(spot) ? best : spot), null);
  }
  const under = (event) => {
    const box = picture.getBoundingClientRect();
    show(nearest(event.clientX - box.left, event.clientY - box.top, shown.flat()));
  };
  picture.addEventListener("pointermove", under);
  picture.addEventListener("pointerdown", under);
  picture.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(null); });
  picture.addEventListener("blur", () => show(null));
  picture.addEventListener("focus", () => { if (!state.at) show(shown.find((list) => list.length)?.at(-1) ?? null); });
  picture.addEventListener("keydown", (event) => {
    const spot = state.at ?? shown.find((list) => list.length)?.at(-1);
    if (!spot) return;
    const own = shown[spot.curve];
    const curve = (by) => shown[(spot.curve + by + shown.length) % shown.length];
    const moves = {
      ArrowLeft: () => own[Math.max(0, spot.k - 1)],
      ArrowRight: () => own[Math.min(own.length - 1, spot.k + 1)],
      Home: () => own[0],
      End: () => own.at(-1),
      ArrowUp: () => nearest(spot.x, spot.y, curve(-1)),
      ArrowDown: () => nearest(spot.x, spot.y, curve(1)),
      Escape: () => null,
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    show(moves[event.key]());
  });
  guess();
  draw();
  let drawn = plot.clientWidth;
  new ResizeObserver(() => {
    if (plot.clientWidth !== drawn) { drawn = plot.clientWidth; draw(); }
  }).observe(plot);
}
