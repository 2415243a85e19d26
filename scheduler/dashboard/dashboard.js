// Asks the server for new samples and draws them.

const KEY = "xllm-api-key", THEME = "xllm-theme", RANGE = "xllm-range-s";
const RANGES_S = { "1 min": 60, "5 min": 300, "15 min": 900 };
const byId = (id) => document.getElementById(id);

// What a suspect instance last said of itself is no longer so.
const sum = (sample, field) => Object.values(sample.instances).filter((each) => each.health !== "suspect").reduce((total, each) => total + (each[field] ?? 0), 0);
const ofService = (name) => (sample) => sample.service[name] ?? null;
const kvShare = (sample) => share(sum(sample, "kv_used"), sum(sample, "kv_total"));
const hitShare = (sample) => sample.service.prefix_queried_tokens ? sample.service.prefix_hit_tokens / sample.service.prefix_queried_tokens : null;
const stepShare = (how) => (sample) => {
  const { num_exact_steps, num_padded_steps, num_dynamic_steps, num_eager_steps } = sample.service;
  const all = num_exact_steps + num_padded_steps + num_dynamic_steps + num_eager_steps;
  return all ? sample.service[`num_${how}_steps`] / all : null;
};

const CHARTS = [
  { title: "Tokens per second", format: "perSecond", empty: "no tokens in this time", series: [
    { name: "generated", colour: "blue", value: ofService("num_generated_tokens") },
    { name: "prompt", colour: "orange", value: ofService("num_prompt_tokens") }] },
  { title: "Time to first token (TTFT), finished requests", format: "ms", empty: "no request finished in this time", target: (head) => head.ttft_slo_ms, series: [
    { name: "median", colour: "blue", value: ofService("ttft_ms_p50") },
    { name: "95 %", colour: "orange", value: ofService("ttft_ms_p95") },
    { name: "99 %", colour: "pink", value: ofService("ttft_ms_p99") }] },
  { title: "Time per output token (TPOT), finished requests", format: "ms", empty: "no request finished in this time", target: (head) => head.tpot_slo_ms, series: [
    { name: "median", colour: "blue", value: ofService("tpot_ms_p50") },
    { name: "95 %", colour: "orange", value: ofService("tpot_ms_p95") },
    { name: "99 %", colour: "pink", value: ofService("tpot_ms_p99") }] },
  { title: "Sequences", format: "count", empty: "no sequence in this time", series: [
    { name: "running", colour: "blue", value: (sample) => sum(sample, "running") },
    { name: "decoding", colour: "green", value: (sample) => sum(sample, "decoding") },
    { name: "waiting", colour: "red", value: (sample) => sum(sample, "waiting") },
    { name: "offline", colour: "grey", value: (sample) => sum(sample, "offline") }] },
  { title: "Requests that ended", format: "perSecond", isStacked: true, empty: "no request ended in this time", series: [
    { name: "ok", colour: "green", value: ofService("requests_ok") },
    { name: "refused", colour: "orange", value: ofService("requests_refused") },
    { name: "client left", colour: "grey", value: ofService("requests_abort") },
    { name: "error", colour: "red", value: ofService("requests_error") }] },
  { title: "Requests with a target", format: "perSecond", empty: "no request with a target ended in this time", series: [
    { name: "TTFT met", colour: "green", value: ofService("ttft_met") },
    { name: "TTFT missed", colour: "red", value: ofService("ttft_missed") },
    { name: "TPOT met", colour: "blue", value: ofService("tpot_met") },
    { name: "TPOT missed", colour: "pink", value: ofService("tpot_missed") }] },
  { title: "KV memory and prefix cache", format: "percent", isShare: true, series: [
    { name: "KV in use", colour: "blue", value: kvShare },
    { name: "prefix hits", colour: "green", value: hitShare }] },
  { title: "How steps found their graph", format: "percent", isShare: true, isStacked: true, empty: "no step in this time", series: [
    { name: "exact", colour: "green", value: stepShare("exact") },
    { name: "padded", colour: "sky", value: stepShare("padded") },
    { name: "dynamic", colour: "orange", value: stepShare("dynamic") },
    { name: "eager", colour: "red", value: stepShare("eager") }] },
  { title: "Preemptions", format: "perSecond", empty: "nobody was preempted in this time", series: [
    { name: "sequences", colour: "red", value: ofService("num_preemptions") }] },
];
const CLUSTER_CHARTS = [
  { title: "Hand-overs from prefill to decode", format: "perSecond", empty: "nothing was handed over in this time", series: [
    { name: "placed apart", colour: "blue", value: ofService("cluster_num_split") },
    { name: "handed over", colour: "green", value: ofService("cluster_num_handed_over") },
    { name: "not all KV arrived", colour: "red", value: ofService("num_failed_hand_overs") }] },
  { title: "Prefixes fetched from other instances", format: "perSecond", empty: "no prefix was fetched in this time", series: [
    { name: "asked for", colour: "blue", value: ofService("cluster_num_fetches") },
    { name: "not whole", colour: "red", value: ofService("cluster_num_failed_fetches") }] },
  { title: "KV sent between instances", format: "bytesPerSecond", empty: "no KV was sent in this time", series: [
    { name: "arrived", colour: "blue", value: ofService("num_sent_bytes") }] },
  { title: "Failover", format: "perSecond", empty: "no instance was lost in this time", series: [
    { name: "placements lost", colour: "red", value: ofService("cluster_num_lost") },
    { name: "refused by instances", colour: "orange", value: ofService("cluster_num_refused") },
    { name: "tokens resumed", colour: "blue", value: ofService("cluster_num_resumed_tokens") }] },
];

// Each: label, [value, unit] and a note of the last sample; [note, isBad] where it can be bad.
const against = (ms, target) => (target ? [`target ${FORMATS.ms(target)}`, ms !== null && ms > target] : ["of the last 30 s", false]);
const perMinute = (samples, name) => samples.slice(-60).reduce((total, sample) => total + (sample.service[name] ?? 0), 0);
const TILES = [
  ["Tokens", (sample) => [short(sample.service.num_generated_tokens), "/s"], (sample) => [`${short(sample.service.num_prompt_tokens)}/s of prompts`]],
  ["TTFT, 95 %", (sample) => duration(sample.service.ttft_ms_p95), (sample, head) => against(sample.service.ttft_ms_p95, head.ttft_slo_ms)],
  ["TPOT, 95 %", (sample) => duration(sample.service.tpot_ms_p95), (sample, head) => against(sample.service.tpot_ms_p95, head.tpot_slo_ms)],
  ["Running", (sample) => [short(sum(sample, "running")), ""], (sample) => [`${short(sum(sample, "offline"))} offline, ${short(sample.service.open)} open`]],
  ["Waiting", (sample) => [short(sum(sample, "waiting")), ""], () => ["for a place"]],
  ["KV in use", (sample) => [digits(100 * kvShare(sample)), "%"], (sample) => [`${short(sum(sample, "kv_used"))} of ${short(sum(sample, "kv_total"))}`]],
  ["Not answered", (sample, head, samples) => [short(Math.round(perMinute(samples, "requests_error") + perMinute(samples, "requests_refused"))), ""],
    (sample, head, samples) => [`${short(Math.round(perMinute(samples, "requests_error")))} errors, 1 min`, perMinute(samples, "requests_error") >= 0.5]],
  ["Instances", (sample) => [short(Object.values(sample.instances).filter((each) => each.health !== "suspect").length), ""],
    (sample) => { const lost = Object.values(sample.instances).filter((each) => each.health === "suspect").length; return [lost ? `${lost} suspect` : "all answer", lost > 0]; }],
];

const state = { head: null, samples: [], rangeS: Number(sessionStorage.getItem(RANGE)) || 300, answeredAt: 0, charts: [], tiles: [] };
const hover = new Hover(byId("tooltip"), () => draw());
const strips = new Strips(hover);

function build(head) {
  document.title = `${head.title} - xllm-compile`;
  byId("title").textContent = head.title;
  byId("subtitle").textContent = `${head.is_gateway ? "gateway" : "server"}, xllm-compile ${head.version}`;
  byId("instances-title").textContent = head.is_gateway ? "Instances" : "Models";
  state.charts = [...CHARTS, ...(head.is_gateway ? CLUSTER_CHARTS : [])].map((spec) => new Chart(spec, hover));
  byId("charts").replaceChildren(...state.charts.map((chart) => chart.card));
  state.tiles = TILES.slice(0, head.is_gateway ? TILES.length : -1).map(([label, value, note]) => {
    const shown = html("div", { class: "value" }), below = html("div", { class: "note" });
    byId("tiles").append(html("article", { class: "card tile", "data-tile": label }, html("h2", {}, label), shown, below));
    return { value, note, shown, below };
  });
}

function draw() {
  const { head, samples } = state;
  if (!head) return;
  const end = samples.at(-1)?.at ?? Date.now() / 1000;
  const range = { begin: end - state.rangeS, end };
  const shown = samples.filter((sample) => sample.at >= range.begin);
  Object.assign(hover, { samples: shown, range });
  const last = samples.at(-1);
  for (const { value, note, shown: element, below } of state.tiles) {
    const [number, unit] = last ? value(last, head, samples) : ["-", ""];
    element.replaceChildren(number, html("small", {}, unit));
    const [text, isBad] = last ? note(last, head, samples) : ["", false];
    below.textContent = text;
    below.toggleAttribute("data-bad", Boolean(isBad));
  }
  strips.draw(shown, range);
  for (const chart of state.charts) chart.draw(shown, range, head);
}

function show(name, text) {
  byId("status").dataset.state = name;
  byId("status").textContent = text;
}

function askKey(wasWrong) {
  byId("key").hidden = false;
  byId("main").hidden = true;
  byId("key-error").hidden = !wasWrong;
  show("wait", "waits for the key");
}

async function poll() {
  const query = state.head ? `?since=${state.head.next}&epoch=${state.head.epoch}` : "";
  const key = sessionStorage.getItem(KEY);
  let content;
  try {
    const answer = await fetch(`dashboard/data${query}`, { headers: key ? { authorization: `Bearer ${key}` } : {}, signal: AbortSignal.timeout(5000) });
    if (answer.status === 401) { askKey(Boolean(key)); return null; }
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    content = await answer.json();
  } catch {
    show("lost", state.answeredAt ? `no answer for ${Math.round((Date.now() - state.answeredAt) / 1000)} s` : "no answer yet");
    return 2000;
  }
  take(content);
  return state.head.period_s * 1000;
}

function take(answer) {
  const { samples, ...head } = answer;
  if (state.head?.epoch !== head.epoch) state.samples = [];
  for (const sample of samples) {
    for (const [name, values] of Object.entries(sample.instances)) {
      sample.instances[name] = Object.fromEntries(head.instance_fields.map((field, at) => [field, values[at]]));
    }
    state.samples.push(sample);
  }
  state.samples.splice(0, state.samples.length - head.kept_s / head.period_s);
  if (!state.head) build(head);
  state.head = head;
  state.answeredAt = Date.now();
  show("live", "live");
  draw();
}

async function run() {
  for (;;) {
    const waitMs = document.hidden ? 1000 : await poll();
    // The form begins anew.
    if (waitMs === null) return;
    await new Promise((done) => setTimeout(done, waitMs));
  }
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key-input").value.trim());
  byId("key").hidden = true;
  byId("main").hidden = false;
  run();
});

for (const [text, seconds] of Object.entries(RANGES_S)) {
  const button = html("button", { type: "button", "aria-pressed": seconds === state.rangeS }, text);
  button.addEventListener("click", () => {
    state.rangeS = seconds;
    sessionStorage.setItem(RANGE, seconds);
    for (const each of byId("ranges").children) each.setAttribute("aria-pressed", each === button);
    draw();
  });
  byId("ranges").append(button);
}

const theme = localStorage.getItem(THEME) ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.dataset.theme = theme;
byId("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem(THEME, next);
});
addEventListener("resize", draw);
run();
