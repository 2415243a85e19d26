// Line and stacked charts over one shared time axis, drawn as SVG.

const SVG = "http://www.w3.org/2000/svg";
const AXIS_PX = 54, FOOT_PX = 16, TOP_PX = 6, GAP_S = 4;

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function html(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

function short(value) {
  if (value === null || value === undefined) return "-";
  for (const [size, letter] of UNITS) if (Math.abs(value) >= size) return `${digits(value / size)}${letter}`;
  return digits(value);
}

function digits(value) {
  const size = Math.abs(value);
  return size >= 100 || Number.isInteger(value) ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(2);
}

// [number, unit] of milliseconds, in what people say.
function duration(ms) {
  if (ms === null || ms === undefined) return ["-", ""];
  return ms >= 1000 ? [digits(ms / 1000), "s"] : ms >= 1 || ms === 0 ? [digits(ms), "ms"] : [digits(ms * 1000), "us"];
}

const withUnit = (value, unit) => (value === null || value === undefined ? "-" : `${short(value)}${unit}`);

const FORMATS = {
  count: short,
  ms: (value) => duration(value).join(" ").trim(),
  percent: (value) => (value === null || value === undefined ? "-" : `${digits(100 * value)} %`),
  perSecond: (value) => withUnit(value, "/s"),
  bytesPerSecond: (value) => withUnit(value, "B/s"),
};

// The least of 1, 2, 5 times a power of ten that holds the value.
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}

function clock(at, withSeconds) {
  return new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", ...(withSeconds && { second: "2-digit" }), hour12: false });
}

const DASHES = ["none", "6 3", "2 3", "8 3 2 3"];

// spec: title, format, series [{name, colour, value(sample)}], isStacked, isShare (0 to 1), target(head), empty
class Chart {
  constructor(spec, hover) {
    this.spec = spec;
    this.hover = hover;
    this.legend = html("div", { class: "legend" });
    this.plot = svg("svg", { class: "plot", role: "img", "aria-label": spec.title });
    this.card = html("article", { class: "card chart" }, html("div", { class: "head" }, html("h2", {}, spec.title)), this.legend, this.plot);
    this.latest = spec.series.map((series, at) => {
      const key = svg("svg", { width: 16, height: 8 });
      const line = svg("line", { x1: 0, x2: 16, y1: 4, y2: 4, "stroke-width": spec.isStacked ? 8 : 2 });
      line.style.stroke = `var(--${series.colour})`;
      if (!spec.isStacked) line.setAttribute("stroke-dasharray", DASHES[at % DASHES.length]);
      key.append(line);
      const value = html("b", {}, "-");
      this.legend.append(html("span", {}, key, `${series.name} `, value));
      return value;
    });
    this.plot.addEventListener("pointermove", (event) => hover.move(event, this.plot, AXIS_PX, (sample) => this.describe(sample)));
    this.plot.addEventListener("pointerleave", () => hover.leave());
  }

  describe(sample) {
    const { format, series } = this.spec;
    return series.map((each) => `${each.name}: ${FORMATS[format](each.value(sample))}`);
  }

  draw(samples, range, head) {
    const { spec, plot } = this;
    const last = samples.at(-1);
    spec.series.forEach((series, at) => { this.latest[at].textContent = last ? FORMATS[spec.format](series.value(last)) : "-"; });
    const width = plot.clientWidth, height = plot.clientHeight;
    if (!width) return;
    this.range = range;
    const rows = samples.map((sample) => this.values(sample));
    const target = spec.target?.(head) ?? null;
    const values = rows.flat().filter((value) => value !== null);
    const highest = Math.max(0, ...values, target ?? 0);
    const top = spec.isShare ? 1 : ceiling(highest || 1);
    const x = (at) => AXIS_PX + ((at - range.begin) / (range.end - range.begin)) * (width - AXIS_PX);
    const y = (value) => TOP_PX + (1 - value / top) * (height - TOP_PX - FOOT_PX);
    const parts = [...axes(width, height, x, y, top, range, FORMATS[spec.format])];
    const isEmpty = !values.some((value) => value > 0) && spec.empty;
    if (!isEmpty) {
      const times = samples.map((sample) => sample.at);
      for (let at = spec.series.length - 1; at >= 0; at--) {
        const column = rows.map((row) => row[at]);
        const below = at ? rows.map((row) => row[at - 1]) : rows.map(() => 0);
        const path = spec.isStacked ? area(times, column, below, x, y) : line(times, column, x, y);
        const made = svg("path", { d: path, class: spec.isStacked ? "area" : "line" });
        made.style[spec.isStacked ? "fill" : "stroke"] = `var(--${spec.series[at].colour})`;
        if (!spec.isStacked) made.style.strokeDasharray = DASHES[at % DASHES.length];
        parts.push(made);
      }
    }
    if (target !== null) {
      parts.push(svg("line", { class: "target", x1: AXIS_PX, x2: width, y1: y(target), y2: y(target) }));
      // At the top of the plot there is no room above it.
      const label = y(target) < TOP_PX + 10 ? y(target) + 12 : y(target) - 3;
      parts.push(svg("text", { x: width - 2, y: label, "text-anchor": "end" }, `target ${FORMATS[spec.format](target)}`));
    }
    if (isEmpty) parts.push(svg("text", { class: "none", x: (AXIS_PX + width) / 2, y: height / 2 - 8 }, spec.empty));
    if (this.hover.at !== null) parts.push(svg("line", { class: "cross", x1: x(this.hover.at), x2: x(this.hover.at), y1: 0, y2: height - FOOT_PX }));
    plot.replaceChildren(...parts);
  }

  // Of stacked series the sums from the first one on.
  values(sample) {
    let sum = 0;
    return this.spec.series.map((series) => {
      const value = series.value(sample);
      if (!this.spec.isStacked) return value;
      sum += value ?? 0;
      return sum;
    });
  }
}

function* axes(width, height, x, y, top, range, format) {
  for (const share of [0, 0.5, 1]) {
    const at = y(share * top);
    yield svg("line", { class: share ? "grid" : "axis", x1: AXIS_PX, x2: width, y1: at, y2: at });
    yield svg("text", { x: AXIS_PX - 5, y: at + 4, "text-anchor": "end" }, format(share * top));
  }
  for (const share of [0, 0.5, 1]) {
    const at = range.begin + share * (range.end - range.begin);
    yield svg("text", { x: x(at), y: height - 3, "text-anchor": ["start", "middle", "end"][2 * share] }, clock(at, range.end - range.begin < 120));
  }
}

function line(times, values, x, y) {
  let path = "", before = null;
  times.forEach((at, index) => {
    if (values[index] === null) { before = null; return; }
    const isGap = before === null || at - before > GAP_S;
    path += `${isGap ? "M" : "L"}${x(at).toFixed(1)},${y(values[index]).toFixed(1)}`;
    // A value between two gaps would not show.
    if (isGap) path += "h0.8";
    before = at;
  });
  return path;
}

function area(times, above, below, x, y) {
  const pieces = [];
  times.forEach((at, index) => {
    if (index === 0 || at - times[index - 1] > GAP_S) pieces.push([]);
    pieces.at(-1).push(index);
  });
  return pieces.map((piece) => {
    const point = (values) => (index) => `${x(times[index]).toFixed(1)},${y(values[index]).toFixed(1)}`;
    return `M${piece.map(point(above)).join("L")}L${piece.reverse().map(point(below)).join("L")}Z`;
  }).join("");
}

// What the pointer is on: one time for all charts, one tooltip.
class Hover {
  constructor(tooltip, redraw) {
    this.tooltip = tooltip;
    this.redraw = redraw;
    this.at = null;
    this.samples = [];
    this.range = { begin: 0, end: 1 };
  }

  move(event, element, leftPx, describe) {
    const box = element.getBoundingClientRect();
    const share = (event.clientX - box.left - leftPx) / (box.width - leftPx);
    const wanted = this.range.begin + share * (this.range.end - this.range.begin);
    const sample = nearest(this.samples, wanted);
    if (!sample || share < 0 || Math.abs(sample.at - wanted) > GAP_S + (this.range.end - this.range.begin) / box.width) return this.leave();
    this.at = sample.at;
    this.tooltip.textContent = [clock(sample.at, true), ...describe(sample)].join("\n");
    this.tooltip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = this.tooltip;
    const left = event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
    const above = event.clientY + 14 + height > innerHeight ? event.clientY - 14 - height : event.clientY + 14;
    this.tooltip.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, above)}px)`;
    this.redraw();
  }

  leave() {
    if (this.at === null) return;
    this.at = null;
    this.tooltip.hidden = true;
    this.redraw();
  }
}

function nearest(samples, at) {
  let best = null;
  for (const sample of samples) if (!best || Math.abs(sample.at - at) < Math.abs(best.at - at)) best = sample;
  return best;
}
