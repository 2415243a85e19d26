// One row for each instance: what it did (colour and word) and how it was, over time, and what it has now.

const POOLS = {
  mix: { colour: "green", text: "mix" },
  prefill: { colour: "orange", text: "prefill" },
  decode: { colour: "blue", text: "decode" },
  // Stripes of what it was on what it will be.
  prefill_to_decode: { colour: "blue", stripes: "orange", text: "prefill to decode" },
  decode_to_prefill: { colour: "orange", stripes: "blue", text: "decode to prefill" },
};
const HEALTHS = {
  active: null,
  draining: { colour: "grey", text: "draining" },
  asleep: { colour: "grey", text: "asleep" },
  lease_lost: { colour: "pink", text: "lease lost" },
  suspect: { colour: "red", stripes: "page", text: "suspect" },
};

function look(instance) {
  return HEALTHS[instance.health] ?? POOLS[instance.pool] ?? { colour: "grey", text: instance.pool };
}

function stripes(id, style) {
  const ground = svg("rect", { width: 8, height: 8 });
  ground.style.fill = `var(--${style.colour})`;
  const bar = svg("rect", { width: 3, height: 8 });
  bar.style.fill = `var(--${style.stripes})`;
  return svg("pattern", { id, width: 8, height: 8, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, ground, bar);
}

function fill(style) {
  return style.stripes ? `url(#stripes-${style.colour}-${style.stripes})` : `var(--${style.colour})`;
}

class Strips {
  constructor(hover) {
    this.hover = hover;
    this.root = document.getElementById("strips");
    this.rows = new Map();
    const styles = [...Object.values(POOLS), ...Object.values(HEALTHS).filter(Boolean)];
    const striped = styles.filter((style) => style.stripes);
    const patterns = svg("svg", { width: 0, height: 0, style: "position:absolute" },
      svg("defs", {}, ...striped.map((style) => stripes(`stripes-${style.colour}-${style.stripes}`, style))));
    document.body.append(patterns);
  }

  draw(samples, range) {
    const names = [...new Set(samples.flatMap((sample) => Object.keys(sample.instances)))].sort();
    for (const name of this.rows.keys()) if (!names.includes(name)) { this.rows.get(name).row.remove(); this.rows.delete(name); }
    names.forEach((name, at) => {
      if (!this.rows.has(name)) this.rows.set(name, this.makeRow(name));
      const { row } = this.rows.get(name);
      if (this.root.children[at] !== row) this.root.insertBefore(row, this.root.children[at] ?? null);
      this.drawRow(this.rows.get(name), name, samples, range);
    });
    const last = samples.at(-1);
    const isUp = last && Object.values(last.instances).some((each) => each.health !== "suspect");
    const note = document.getElementById("no-instance");
    note.hidden = !last || isUp;
    note.textContent = names.length ? "No instance is up: requests are refused until one answers." : "No instance is up. Instances appear here as they register.";
    this.drawLegend(samples);
  }

  makeRow(name) {
    const plot = svg("svg", { role: "img" });
    const now = html("div", { class: "now" });
    const row = html("div", { class: "strip", "data-instance": name }, html("div", { class: "name", title: name }, name), plot, now);
    plot.addEventListener("pointermove", (event) => this.hover.move(event, plot, 0, (sample) => describeInstance(name, sample.instances[name])));
    plot.addEventListener("pointerleave", () => this.hover.leave());
    return { row, plot, now };
  }

  drawRow({ plot, now }, name, samples, range) {
    const width = plot.clientWidth;
    const x = (at) => ((at - range.begin) / (range.end - range.begin)) * width;
    const ground = svg("rect", { x: 0, y: 9, width, height: 2 });
    ground.style.fill = "var(--absent)";
    const parts = [ground];
    for (const piece of runs(name, samples)) {
      const style = look(piece.instance);
      const left = Math.max(0, x(piece.begin)), right = Math.min(width, x(piece.end));
      const rect = svg("rect", { x: left, y: 1, width: Math.max(1, right - left), height: 18, rx: 2, "data-pool": piece.instance.pool, "data-health": piece.instance.health });
      rect.style.fill = fill(style);
      parts.push(rect);
      if (right - left > 12 + 6.4 * style.text.length && !style.stripes) parts.push(svg("text", { x: left + 6, y: 14 }, style.text));
    }
    if (this.hover.at !== null) {
      const cross = svg("rect", { x: x(this.hover.at), y: 0, width: 1, height: 20 });
      cross.style.fill = "var(--ink)";
      parts.push(cross);
    }
    plot.replaceChildren(...parts);
    const instance = samples.at(-1)?.instances[name];
    plot.setAttribute("aria-label", `${name}: ${instance ? look(instance).text : "gone"}`);
    now.replaceChildren(...(instance ? describeNow(instance) : ["gone"]));
  }

  drawLegend(samples) {
    const seen = new Map();
    for (const sample of samples) for (const each of Object.values(sample.instances)) seen.set(look(each).text, look(each));
    document.getElementById("strip-legend").replaceChildren(...[...seen.values()].map((style) => {
      const box = svg("rect", { width: 12, height: 10, rx: 2 });
      box.style.fill = fill(style);
      return html("span", {}, svg("svg", { width: 12, height: 10 }, box), style.text);
    }));
  }
}

// Stretches of time in which an instance was the same.
function runs(name, samples) {
  const found = [];
  for (const sample of samples) {
    const instance = sample.instances[name], last = found.at(-1);
    if (!instance) continue;
    const goesOn = last && sample.at - last.end < GAP_S;
    if (goesOn) last.end = sample.at;
    if (!goesOn || look(last.instance) !== look(instance)) found.push({ begin: sample.at, end: sample.at + 1, instance });
  }
  return found;
}

function share(used, total) {
  return total ? used / total : 0;
}

function describeNow(instance) {
  const bar = html("i", {});
  const kv = share(instance.kv_used, instance.kv_total);
  bar.style.width = `${Math.min(100, 100 * kv)}%`;
  return [
    html("span", { title: "Sequences in steps" }, html("b", {}, short(instance.running)), " running"),
    html("span", { title: "Sequences that wait for a place" }, html("b", {}, short(instance.waiting)), " waiting"),
    html("span", { title: `${instance.kv_used} of ${instance.kv_total} KV tokens` }, html("span", { class: "bar" }, bar), `KV ${FORMATS.percent(kv)}`),
  ];
}

function describeInstance(name, instance) {
  if (!instance) return [name, "not there"];
  return [
    `${name}: ${(POOLS[instance.pool] ?? { text: instance.pool }).text}, ${instance.health.replace("_", " ")}`,
    `running ${instance.running} (decoding ${instance.decoding}), waiting ${instance.waiting}, offline ${instance.offline}`,
    `KV ${short(instance.kv_used)} of ${short(instance.kv_total)} tokens`,
    `${short(instance.tokens_per_s)} tokens/s, TTFT ${FORMATS.ms(instance.ttft_ms)}, TPOT ${FORMATS.ms(instance.tpot_ms)}`,
    ...(instance.sent_bytes_per_s ? [`KV sent ${FORMATS.bytesPerSecond(instance.sent_bytes_per_s)}`] : []),
  ];
}
