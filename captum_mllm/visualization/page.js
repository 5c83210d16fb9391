"use strict";
(async () => {
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const node = (name, attributes = {}, ...inside) => {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
};
const html = (name, text = "", kind = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const words = D.context.slice(D.first);
const answer = [...document.querySelectorAll("#answer .w")];
const context = [...document.querySelectorAll(".c")];

// ---- the evidence: grey pictures of 8 bits, read once --------------------------------------

async function pixels(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0);
  const { data, width } = pen.getImageData(0, 0, canvas.width, canvas.height);
  return { at: (x, y) => (x < width ? data[4 * (y * width + x)] : 0) };
}

// levels[method][picture][word]: one value per cell
async function readLevels(method, m) {
  return Promise.all(method.atlases.map(async (atlas, p) => {
    const sheet = await pixels($(`atlas-${m}-${p}`).getAttribute("href"));
    return words.map((_, n) => {
      const cells = new Uint8Array(atlas.rows * atlas.cols);
      const [left, top] = place(atlas, n);
      for (let y = 0; y < atlas.rows; y++)
        for (let x = 0; x < atlas.cols; x++) cells[y * atlas.cols + x] = sheet.at(left + x, top + y);
      return cells;
    });
  }));
}
const place = (atlas, n) => [
  Math.floor(n / atlas.down) * (atlas.cols + 2) + 1,
  (n % atlas.down) * (atlas.rows + 2) + 1,
];
async function readText(method) {
  if (!method.text) return words.map(() => new Uint8Array(D.context.length));
  const sheet = await pixels(method.text);
  return words.map((_, n) => Uint8Array.from(D.context, (_, c) => sheet.at(c, n)));
}
const levels = await Promise.all(D.methods.map(readLevels));
const text = await Promise.all(D.methods.map(readText));

// ---- state -----------------------------------------------------------------------------------

const state = { method: 0, pins: [], hover: null, region: null, colours: $("colours").value,
  opacity: 0.7, outline: false, fresh: true };
const method = () => D.methods[state.method];
const range = (pin) => Array.from({ length: pin.to - pin.from + 1 }, (_, k) => pin.from + k);
const largest = (arrays) => arrays.reduce((most, each) => most.map((v, k) => Math.max(v, each[k])));
const mapOf = (pin, p) => largest(range(pin).map((n) => levels[state.method][p][n]));
const peakOf = (pin) => Math.max(...D.pictures.map((_, p) => Math.max(...mapOf(pin, p))));
const value = (level) => (level / 255) * method().top;
const number = (x) => Number(x.toPrecision(3)).toString();
const phrase = (pin) => range(pin).map((n, k) => (k ? words[n].before : "") + words[n].text).join("");
const probability = (pin) => range(pin).reduce((product, n) => product * words[n].probability, 1);
const NEAR = D.near_zero;

// Before the reader does anything: the content word with the most evidence.
const start = words.map((word, n) => [word.content, peakOf({ from: n, to: n }), -n])
  .reduce((best, each) => (each[0] - best[0] || each[1] - best[1]) > 0 ? each : best);

function shown() {
  const chosen = [...state.pins];
  if (state.fresh) return [{ from: -start[2], to: -start[2] }];
  if (state.hover !== null && chosen.length < 2) {
    const one = { from: state.hover, to: state.hover };
    if (!chosen.some((pin) => pin.from <= state.hover && state.hover <= pin.to)) chosen.push(one);
  }
  return chosen;
}

// ---- a map over its picture --------------------------------------------------------------------

// A grey picture of one map with its border cells repeated, so that it is drawn as in the atlas.
function tile(cells, rows, cols) {
  const canvas = document.createElement("canvas");
  canvas.width = cols + 2;
  canvas.height = rows + 2;
  const pen = canvas.getContext("2d");
  const made = pen.createImageData(cols + 2, rows + 2);
  const inside = (v, n) => Math.min(Math.max(v, 0), n - 1);
  for (let y = 0; y < rows + 2; y++)
    for (let x = 0; x < cols + 2; x++) {
      const level = cells[inside(y - 1, rows) * cols + inside(x - 1, cols)];
      made.data.set([level, level, level, 255], 4 * (y * (cols + 2) + x));
    }
  pen.putImageData(made, 0, 0);
  return canvas.toDataURL();
}

// Outline at half of the map's own peak: marching squares over the centres of the cells.
function outline(cells, rows, cols) {
  const level = Math.max(...cells) / 2;
  if (level < NEAR * 255) return "";
  const at = (x, y) => (x < 0 || y < 0 || x >= cols || y >= rows ? 0 : cells[y * cols + x]);
  const parts = [];
  for (let y = -1; y < rows; y++)
    for (let x = -1; x < cols; x++) {
      const corner = [at(x, y), at(x + 1, y), at(x + 1, y + 1), at(x, y + 1)];
      const spot = [[x, y], [x + 1, y], [x + 1, y + 1], [x, y + 1]];
      const cuts = [];
      for (let k = 0; k < 4; k++) {
        const [a, b] = [corner[k], corner[(k + 1) % 4]];
        if (a >= level === b >= level) continue;
        const share = (level - a) / (b - a);
        cuts.push([0, 1].map((axis) => spot[k][axis] + share * (spot[(k + 1) % 4][axis] - spot[k][axis])));
      }
      for (let k = 0; k + 1 < cuts.length; k += 2)
        parts.push(`M${cuts[k].map((v) => v + 0.5)}L${cuts[k + 1].map((v) => v + 0.5)}`);
    }
  return parts.join("");
}

function drawing(pin, p) {
  const picture = D.pictures[p];
  const svg = node("svg", { viewBox: `0 0 ${picture.width} ${picture.height}`, role: "img" });
  const base = node("use", { href: `#picture-${p}` });
  svg.append(base);
  svg.dataset.picture = p;
  if (!pin) {
    svg.setAttribute("aria-label", picture.title);
    return svg;
  }
  const { rows, cols } = method().atlases[p];
  const [left, top, right, bottom] = picture.box;
  const cells = mapOf(pin, p);
  const frame = { x: left, y: top, width: right - left, height: bottom - top,
    preserveAspectRatio: "none" };
  svg.setAttribute("aria-label", `${picture.title}: regions that support ${phrase(pin)}`);
  base.setAttribute("filter", "url(#calm)");
  if (state.outline) {
    const path = node("path", { d: outline(cells, rows, cols), fill: "none", stroke: "#fff",
      "stroke-width": "4", "vector-effect": "non-scaling-stroke" });
    const line = path.cloneNode();
    line.setAttribute("stroke", "#000");
    line.setAttribute("stroke-width", "2");
    svg.append(node("svg", { ...frame, viewBox: `0 0 ${cols} ${rows}` }, path, line));
  } else {
    const image = node("image", { href: tile(cells, rows, cols), width: cols + 2, height: rows + 2 });
    const heat = node("svg", { ...frame, viewBox: `1 1 ${cols} ${rows}` }, image);
    svg.append(node("g", { filter: `url(#heat-${state.colours})`, opacity: state.opacity }, heat));
  }
  return svg;
}

function mark(svg) {
  const { region } = state;
  if (!region || Number(svg.dataset.picture) !== region.p) return;
  const [x0, y0, x1, y1] = region.box;
  const side = Math.max(D.pictures[region.p].width, D.pictures[region.p].height) / 60;
  const point = x1 - x0 < 1 && y1 - y0 < 1;
  const box = point ? { x: x0 - side / 2, y: y0 - side / 2, width: side, height: side }
    : { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  for (const [stroke, width] of [["#fff", 4], ["#000", 2]])
    svg.append(node("rect", { ...box, fill: "none", stroke, "stroke-width": width,
      "vector-effect": "non-scaling-stroke" }));
}

// ---- places of the picture ---------------------------------------------------------------------

// The map at a point of the picture, bilinear between the centres of its cells; 0 outside the box.
function levelAt(cells, rows, cols, box, x, y) {
  const [left, top, right, bottom] = box;
  if (x < left || y < top || x > right || y > bottom) return 0;
  const u = Math.min(Math.max(((x - left) / (right - left)) * cols - 0.5, 0), cols - 1);
  const v = Math.min(Math.max(((y - top) / (bottom - top)) * rows - 0.5, 0), rows - 1);
  const [c, r] = [Math.min(Math.floor(u), Math.max(cols - 2, 0)), Math.min(Math.floor(v), Math.max(rows - 2, 0))];
  const [fu, fv] = [u - c, v - r];
  const at = (rr, cc) => cells[Math.min(rr, rows - 1) * cols + Math.min(cc, cols - 1)];
  return (1 - fv) * ((1 - fu) * at(r, c) + fu * at(r, c + 1)) + fv * ((1 - fu) * at(r + 1, c) + fu * at(r + 1, c + 1));
}

// Mean over the place, of every word: 24 x 24 points of a box.
function support(region) {
  const { rows, cols } = method().atlases[region.p];
  const [x0, y0, x1, y1] = region.box;
  const steps = x1 - x0 < 1 && y1 - y0 < 1 ? 1 : 24;
  return levels[state.method][region.p].map((cells) => {
    let sum = 0;
    for (let i = 0; i < steps; i++)
      for (let j = 0; j < steps; j++)
        sum += levelAt(cells, rows, cols, D.pictures[region.p].box,
          x0 + ((i + 0.5) / steps) * (x1 - x0), y0 + ((j + 0.5) / steps) * (y1 - y0));
    return sum / steps ** 2;
  });
}

function spot(svg, event) {
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const { width, height } = D.pictures[Number(svg.dataset.picture)];
  return [Math.min(Math.max(at.x, 0), width), Math.min(Math.max(at.y, 0), height)];
}

function choose(p, a, b) {
  state.region = { p, box: [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])] };
  state.hover = null;
  draw();
}

function listen(svg, p) {
  svg.setAttribute("tabindex", "0");
  svg.setAttribute("role", "application"); // so that screen readers leave the arrow keys to it
  svg.setAttribute("aria-label", `${svg.getAttribute("aria-label")}. Arrow keys choose a place.`);
  let start = null;
  svg.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    start = spot(svg, event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointerup", (event) => {
    if (!start) return;
    const end = spot(svg, event);
    const near = Math.hypot(end[0] - start[0], end[1] - start[1]) < D.pictures[p].width / 80;
    choose(p, start, near ? start : end);
  });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const { box, width, height } = D.pictures[p];
    const { rows, cols } = method().atlases[p];
    const step = [(box[2] - box[0]) / cols, (box[3] - box[1]) / rows];
    const now = state.region && state.region.p === p ? state.region.box : [width / 2, height / 2];
    const next = [0, 1].map((axis) => Math.min(Math.max(now[axis] + move[axis] * step[axis], 0), [width, height][axis]));
    choose(p, next, next);
  });
}

// ---- drawing everything --------------------------------------------------------------------

function drawStage() {
  const chosen = shown();
  const figures = [];
  for (const pin of chosen.length ? chosen : [null])
    D.pictures.forEach((picture, p) => {
      const figure = document.createElement("figure");
      const svg = drawing(pin, p);
      listen(svg, p);
      mark(svg);
      const caption = html("figcaption");
      if (pin) {
        const bold = html("b");
        bold.append(html("bdi", phrase(pin)));
        caption.append(bold, D.pictures.length > 1 ? ` · ${picture.title}` : "");
      } else caption.textContent = picture.title;
      figure.append(svg, caption);
      figures.push(figure);
    });
  const drawn = () => [...$("views").querySelectorAll("svg[data-picture]")];
  const focused = drawn().indexOf(document.activeElement);
  $("views").replaceChildren(...figures);
  if (focused >= 0) drawn()[Math.min(focused, drawn().length - 1)].focus({ preventScroll: true });
  $("scale").textContent = `${number(method().top)} (${method().units})`;
  $("bar-heat").setAttribute("filter", `url(#heat-${state.colours})`);
}

const tint = (kind, level) => (level < NEAR * 255 ? "" : `rgba(var(--${kind}),calc(var(--strength)*${(0.15 + 0.85 * (level / 255)).toFixed(3)}))`);

function drawText() {
  const chosen = shown();
  const last = chosen[chosen.length - 1];
  const row = last ? largest(range(last).map((n) => text[state.method][n])) : null;
  const lit = state.region ? support(state.region) : null;
  context.forEach((span) => {
    const n = Number(span.dataset.c) - D.first;
    const inside = chosen.some((pin) => pin.from <= n && n <= pin.to);
    let colour = "";
    if (lit && n >= 0) colour = tint("image", lit[n]);
    else if (last && !(n >= last.from)) colour = tint("text", row[n + D.first]);
    else if (!last && n >= 0 && !lit) colour = tint("image", peakOf({ from: n, to: n }));
    span.style.background = colour;
    span.classList.toggle("shown", inside);
    if (n < 0) return;
    const pinned = state.pins.some((pin) => pin.from <= n && n <= pin.to);
    span.classList.toggle("pinned", pinned);
    span.setAttribute("aria-pressed", String(pinned));
  });
}

function drawDetail() {
  const chosen = shown();
  const lines = [];
  const line = (...parts) => {
    const p = html("p");
    p.append(...parts);
    lines.push(p);
  };
  const named = (label) => { const b = html("b"); b.append(html("bdi", label)); return b; };
  for (const pin of chosen) {
    const peaks = range(pin).map((n) => method().peaks[n]).filter((peak) => peak);
    const best = peaks.reduce((most, peak) => (most && most[1] >= peak[1] ? most : peak), null);
    const found = best ? `strongest region ${best[2]}, ${number(best[1])}` : "no image region supports it";
    line(named(phrase(pin)), ` probability ${probability(pin).toFixed(3)}; ${found}`);
    const row = largest(range(pin).map((n) => text[state.method][n]));
    const led = [...row.keys()]
      .filter((c) => c < pin.from + D.first && row[c] >= Math.max(NEAR * 255, 1) && D.context[c].part !== "template")
      .sort((a, b) => row[b] - row[a]).slice(0, 5);
    if (!method().text) line("This method says nothing about the text.");
    else if (!led.length) line("No earlier word supports it.");
    else {
      const parts = ["Led by: "];
      led.forEach((c, k) => parts.push(k ? ", " : "", html("bdi", D.context[c].text),
        ` ${number((row[c] / 255) * method().text_top)}`));
      line(...parts);
    }
  }
  if (state.region) {
    const lit = support(state.region);
    const order = [...lit.keys()].filter((n) => lit[n] >= NEAR * 255).sort((a, b) => lit[b] - lit[a]).slice(0, 8);
    const parts = [order.length ? "This place supports: " : "This place supports no word of the answer."];
    order.forEach((n, k) => parts.push(k ? ", " : "", html("bdi", words[n].text), ` ${number(value(lit[n]))}`));
    line(...parts);
  }
  if (!lines.length) line("Choose a word, or a place in the picture.");
  $("detail").replaceChildren(...lines);
}

function draw() {
  drawStage();
  drawText();
  drawDetail();
}

// ---- words ---------------------------------------------------------------------------------

let dragged = null;
function pin(n, extend) {
  const last = state.pins[state.pins.length - 1];
  if (extend && last) {
    last.from = Math.min(last.from, n);
    last.to = Math.max(last.to, n);
  } else {
    const at = state.pins.findIndex((one) => one.from <= n && n <= one.to);
    if (at >= 0) state.pins.splice(at, 1);
    else state.pins = [...state.pins, { from: n, to: n }].slice(-2);
  }
  state.region = null;
  draw();
}
function clear() {
  state.pins = [];
  state.hover = null;
  state.region = null;
  draw();
}
const wordAt = (event) => {
  const found = document.elementFromPoint(event.clientX, event.clientY);
  const span = found && found.closest("#answer .w");
  return span ? Number(span.dataset.w) : null;
};
answer.forEach((span, n) => {
  span.setAttribute("role", "button");
  span.setAttribute("tabindex", n ? "-1" : "0");
  span.setAttribute("aria-label", `${words[n].text}, probability ${words[n].probability.toFixed(2)}`);
  span.addEventListener("pointerenter", (event) => {
    if (event.pointerType === "touch" || dragged !== null) return;
    state.hover = n;
    draw();
  });
  span.addEventListener("pointerleave", () => {
    if (state.hover === null || dragged !== null) return;
    state.hover = null;
    draw();
  });
  span.addEventListener("pointerdown", (event) => {
    if (event.button || event.shiftKey) return;
    dragged = n;
    event.preventDefault();
  });
  span.addEventListener("focus", () => {
    answer.forEach((other) => other.setAttribute("tabindex", other === span ? "0" : "-1"));
    if (span.matches(":focus-visible")) {
      state.hover = n;
      draw();
    }
  });
  span.addEventListener("click", (event) => { if (event.shiftKey) pin(n, true); });
  span.addEventListener("keydown", (event) => {
    const way = getComputedStyle($("answer")).direction === "rtl" ? -1 : 1;
    const next = { ArrowRight: n + way, ArrowLeft: n - way, ArrowDown: n + 1, ArrowUp: n - 1,
      Home: 0, End: answer.length - 1 }[event.key];
    if (next !== undefined) {
      event.preventDefault();
      if (answer[next]) answer[next].focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pin(n, event.shiftKey);
    }
  });
});
document.addEventListener("pointerup", (event) => {
  if (dragged === null) return;
  const [start, end] = [dragged, wordAt(event)];
  dragged = null;
  answer[start].focus({ preventScroll: true });
  if (end === null || end === start) pin(start, false);
  else {
    state.pins = [...state.pins, { from: Math.min(start, end), to: Math.max(start, end) }].slice(-2);
    state.region = null;
    state.hover = null;
    draw();
  }
});
document.addEventListener("pointercancel", () => { dragged = null; }); // a scroll, not a drag
document.addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });

// ---- controls ------------------------------------------------------------------------------

$("method").addEventListener("change", (event) => { state.method = Number(event.target.value); draw(); });
$("colours").addEventListener("change", (event) => { state.colours = event.target.value; draw(); });
$("opacity").addEventListener("input", (event) => { state.opacity = event.target.value / 100; draw(); });
$("outline").addEventListener("change", (event) => { state.outline = event.target.checked; draw(); });
$("clear").addEventListener("click", clear);

// All that is shown as one SVG that stands alone.
function standalone() {
  const drawn = [...$("views").querySelectorAll("svg[data-picture]")];
  const high = Math.max(...drawn.map((svg) => D.pictures[svg.dataset.picture].height));
  const defs = document.querySelector("svg.store defs").cloneNode(true);
  defs.querySelectorAll('image[id^="atlas"]').forEach((image) => image.remove());
  const whole = node("svg", { xmlns: NS }, defs);
  let x = 0;
  for (const svg of drawn) {
    const { width, height } = D.pictures[svg.dataset.picture];
    const scaled = (width * high) / height;
    const copy = svg.cloneNode(true);
    for (const [key, v] of Object.entries({ x, y: 0, width: scaled, height: high })) copy.setAttribute(key, v);
    copy.removeAttribute("tabindex");
    whole.append(copy);
    x += scaled + high / 50;
  }
  const wide = x - high / 50;
  for (const [key, v] of Object.entries({ width: wide, height: high, viewBox: `0 0 ${wide} ${high}` })) whole.setAttribute(key, v);
  return { source: new XMLSerializer().serializeToString(whole), wide, high };
}
function download(blob, kind) {
  const link = document.createElement("a");
  const name = shown().map(phrase).join("-").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "picture";
  link.download = `${name}.${kind}`;
  link.href = URL.createObjectURL(blob);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
$("save-svg").addEventListener("click", () => download(new Blob([standalone().source], { type: "image/svg+xml" }), "svg"));
$("save-png").addEventListener("click", async () => {
  const { source, wide, high } = standalone();
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source)}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  const factor = Math.max(1, 800 / high);
  canvas.width = wide * factor;
  canvas.height = high * factor;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => download(blob, "png"));
});

if (D.context.slice(0, D.first).some((word) => word.part === "template")) {
  const button = html("button", "Show the template around it", "script");
  button.type = "button";
  button.id = "whole";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    const whole = $("prompt").classList.toggle("whole");
    button.setAttribute("aria-pressed", String(whole));
  });
  $("prompt").after(button);
}
document.documentElement.classList.add("js");
draw();
for (const kind of ["pointerover", "pointerdown", "keydown"])
  document.addEventListener(kind, (event) => {
    if (!state.fresh || !event.target.closest(".w, #views svg, #clear")) return;
    state.fresh = false;
    if (kind === "pointerdown") draw();
  }, { capture: true });
document.documentElement.dataset.ready = "yes";
})();
