// What the operator's page shows of cameras, actions and events, and the elements it is made of. Nothing in here asks the
// station anything but its frames, and nothing knows how a run goes: see operator.js.

export const $ = (id) => document.getElementById(id);
const SPAN = 20;          // s of the plots
const MOST_ROWS = 400;    // of the timeline
const SLOTS = 2;          // frames waited for at once: a browser has six connections to a station, and a stop needs one
const STILL = 3;          // s after which a camera without a new frame is said to stand still

// ---------------------------------------------------------------------------------------------------- elements

function dress(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);  // strings become text nodes
  return node;
}
export const make = (tag, attributes = {}, ...children) => dress(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  dress(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** Only where it differs: what is set again is read aloud again. */
export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
const NONE = "\u2013", minus = (text) => text.replace("-", "\u2212");
export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
export const short = (value, digits = 3) => isNumber(value) ? minus(String(Number(value.toPrecision(digits)))) : NONE;
/** As exact as a line that spans `range` shows it. */
const rounded = (value, range) => minus(value.toFixed(Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(range / 2 || 1))))).replace(/^-(0\.?0*)$/, "$1"));
export const tenth = (value) => isNumber(value) ? minus(value.toFixed(1)) : NONE;
export const milliseconds = (value) => !isNumber(value) ? NONE : value < 10 ? value.toFixed(1) : String(Math.round(value));
export const lasting = (s) => s < 60 ? `${Math.floor(s)} s` : `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
export const clock = (s) => new Date(1000 * s).toLocaleTimeString([], { hour12: false });
export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
export const list = (value) => Array.isArray(value) ? value : [];

// ---------------------------------------------------------------------------------------------------- cameras

/** Each camera's newest frame, waited for while the page is looked at. */
export class Cameras {
  #free = SLOTS;
  #waiting = [];
  #era = 0;
  #old = false;
  #hidden = new AbortController();

  constructor(node) {
    this.node = node;
    setInterval(() => this.#tell(), 1000);
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#hidden.abort(); else this.#hidden = new AbortController();
    });
  }

  place(cameras) {
    this.node.replaceChildren(...cameras.map((camera) => make("figure", { "data-camera": camera },
      make("img", { alt: `What ${camera} sees`, hidden: true }), make("figcaption", {}, make("span", {}, camera), make("small", {}, "no picture yet")))));
    this.node.dataset.many = String(Math.min(3, cameras.length));
    for (const box of this.node.children) this.#film(box);
  }

  /** What was seen before says nothing of the frames to come; `old`: nobody answers just now. */
  renew(old) { this.#era += 1; this.#old = old; this.#tell(); }

  async #film(box) {
    const path = `v1/station/frame/${encodeURIComponent(box.dataset.camera)}`;
    let last = null, era = this.#era;
    while (box.isConnected) {
      if (document.hidden) {
        await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
        continue;
      }
      if (era !== this.#era) { era = this.#era; last = null; }
      if (!this.#free) await new Promise((done) => this.#waiting.push(done)); else this.#free -= 1;
      let pause = 500;  // where nothing came: never asked in a circle
      try {
        const response = await fetch(last === null ? path : `${path}?after=${encodeURIComponent(last)}`, { cache: "no-store", signal: this.#hidden.signal });
        if (response.status === 200) {
          const blob = await response.blob();
          last = response.headers.get("x-frame");
          this.#show(box, blob, last);
          pause = last === null ? 200 : 30;
        } else if (response.status === 204 || response.status === 304) pause = 100;
      } catch { /* hidden meanwhile, or nobody answers: said by operator.js */ }
      const next = this.#waiting.shift();
      if (next) next(); else this.#free += 1;
      await sleep(pause);
    }
  }

  #show(box, blob, number) {
    const image = box.querySelector("img"), url = URL.createObjectURL(blob);
    image.onload = () => {
      URL.revokeObjectURL(url);
      image.hidden = false;
      image.classList.toggle("small", image.naturalWidth < 200);
      box.dataset.frame = number ?? "";
      box.seen = performance.now();
      this.#say(box);
    };
    image.onerror = () => URL.revokeObjectURL(url);
    image.src = url;
  }

  #tell() { for (const box of this.node.children) this.#say(box); }

  #say(box) {
    if (box.seen === undefined) return;
    const s = (performance.now() - box.seen) / 1000;
    put(box.querySelector("small"), this.#old ? `old, frame ${box.dataset.frame}` : s > STILL ? `still for ${lasting(s)}` : `live, frame ${box.dataset.frame}`);
    box.classList.toggle("still", this.#old || s > STILL);
  }
}

// ---------------------------------------------------------------------------------------------------- plots

const EDGE = 4, AXIS = 16;

/** Actions, confidence and doubt of the last seconds, a strip each, over one axis of time. */
export class Plots {
  #points = [];
  #strips = [];
  #cursor = null;   // s before now, where somebody chose a moment
  #dirty = false;

  constructor(node) {
    this.node = node;
    new ResizeObserver(() => this.#soon()).observe(node);
    node.addEventListener("pointermove", (event) => {
      const { names, values } = this.#sides(), box = node.getBoundingClientRect();
      this.#choose((1 - (event.clientX - box.left - names) / (box.width - names - values)) * SPAN);
    });
    node.addEventListener("pointerleave", () => this.#choose(null));
    node.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: 0.5, ArrowRight: -0.5 }[event.key];
      if (event.key === "End") this.#choose(null); else if (by) this.#choose((this.#cursor ?? 0) + by); else return;
      event.preventDefault();
    });
  }

  place(action, hz) {
    this.hz = hz;
    this.clear();
    const strip = (name, unit, of, low, high) => ({ name, unit, of, low, high });
    this.#strips = [  // what matters most on top: on a small screen the last ones need scrolling
      { ...strip("doubt", "", (point) => point.doubt, 0, undefined), limit: true },
      strip("confidence", "", (point) => point.confidence, 0, 1),
      ...action.map(({ name, unit, low, high }, i) => strip(name, unit === "1" ? "" : unit ?? "", (point) => point.action?.[i], low, high)),
    ];
    this.svg = draw("svg", { role: "img" });
    this.held = draw("path", { fill: "url(#hatch)" });
    this.axis = draw("g", { class: "axis" });
    this.moment = draw("path", { class: "moment" });
    for (const one of this.#strips) {
      one.parts = { frame: draw("path", { class: "frame" }), zero: draw("path", { class: "zero" }), limit: draw("path", { class: "threshold" }), line: draw("path", { class: one.limit ? "line doubt" : "line" }),
                    name: draw("text", { class: "name" }, one.name), unit: draw("text", { class: "unit" }, one.unit), value: draw("text", { class: "value", "text-anchor": "end" }) };
    }
    this.svg.append(this.held, ...this.#strips.flatMap(({ parts }) => Object.values(parts)), this.axis, this.moment);
    this.node.replaceChildren(this.svg);
    this.#soon();
  }

  clear() { this.#points = []; this.#cursor = null; this.#soon(); }

  /** An event of ticks: the newest happened at its `t`, the others a period before each other. */
  add(event) {
    const ticks = list(event.ticks ?? [event]);
    ticks.forEach((tick, i) => {
      const doubts = Object.entries(tick.doubt ?? {}).filter(([, value]) => isNumber(value));
      const [score, doubt] = doubts.find(([name]) => name === tick.score) ?? doubts[0] ?? ["", null];
      const t = tick.t ?? event.t - (ticks.length - 1 - i) / this.hz, before = this.#points.at(-1)?.t ?? -Infinity;
      this.#points.push({ t, first: t - before > Math.max(1, 5 / this.hz), action: tick.action, confidence: tick.confidence, score, doubt,
                          limit: tick.threshold, hold: tick.hold || "", step: tick.step });
    });
    const newest = this.#points.at(-1)?.t ?? 0;
    this.#points = this.#points.filter((point) => point.t > newest - SPAN - 1);
    this.#soon();
  }

  /** For whoever hears instead of looks: the values of now, in words. */
  describe() {
    const last = this.#points.at(-1);
    this.svg?.setAttribute("aria-label", last ? `Now: ${this.#strips.map((one) => `${one.name} ${short(one.of(last))} ${one.unit}`).join(", ")}${last.hold ? `; holds: ${last.hold}` : ""}` : "Nothing yet");
  }

  #choose(back) {
    this.#cursor = back === null || back < 0 || back > SPAN ? null : back;
    this.#soon();
  }

  #soon() {
    if (this.#dirty) return;
    this.#dirty = true;
    requestAnimationFrame(() => { this.#dirty = false; if (this.svg) this.#paint(); });
  }

  #sides() { return { names: this.node.clientWidth < 420 ? 92 : 108, values: 62 }; }

  #paint() {
    const width = this.node.clientWidth, points = this.#points, { names, values } = this.#sides(), count = this.#strips.length;
    const room = Math.max(Math.floor(this.node.getBoundingClientRect().height), count * 15 + AXIS), high = (room - AXIS) / count, end = points.at(-1)?.t ?? 0;
    const x = (t) => names + (1 - (end - t) / SPAN) * (width - names - values), inside = points.filter((point) => point.t >= end - SPAN);
    for (const [name, value] of [["width", width], ["height", room], ["viewBox", `0 0 ${width} ${room}`]]) this.svg.setAttribute(name, value);
    let at = inside.at(-1);
    if (this.#cursor !== null) for (const point of inside) if (point.t <= end - this.#cursor) at = point;
    this.moment.setAttribute("d", this.#cursor !== null && at ? `M${x(at.t)} 0V${room - AXIS}` : "");

    let held = "";
    inside.forEach((point, i) => {
      if (point.hold && !point.first) held += `M${x(inside[i - 1]?.t ?? end - SPAN)} 0H${x(point.t)}V${room - AXIS}H${x(inside[i - 1]?.t ?? end - SPAN)}Z`;
    });
    this.held.setAttribute("d", held);
    this.#strips.forEach((one, i) => this.#strip(one, i * high, high, { inside, x, at, width, names, values }));
    this.axis.replaceChildren(...(width < 420 ? [20, 10, 0] : [20, 15, 10, 5, 0]).map((s) => draw("text", { x: names + (1 - s / SPAN) * (width - names - values), y: room - 3, "text-anchor": s ? s === SPAN ? "start" : "middle" : "end" },
      s ? `\u2212${s} s` : "now")));
  }

  #strip({ of, unit, low, high, limit, parts }, top, tall, { inside, x, at, width, names, values }) {
    const known = inside.map(of).filter(isNumber), bound = limit ? at?.limit : undefined;
    let least = isNumber(low) ? low : Math.min(0, ...known), most = isNumber(high) ? high : Math.max(1e-9, ...known);
    if (limit) { least = Math.min(least, ...known); most = 1.15 * Math.max(1e-9, ...known, ...inside.map((point) => point.limit).filter(isNumber)); }
    const gap = Math.min(5, tall / 8), y = (value) => top + tall - gap - Math.min(1, Math.max(0, (value - least) / (most - least || 1))) * (tall - 2 * gap), across = (value) => `M${names} ${y(value)}H${width - values}`;
    let path = "", pen = "M";
    for (const point of inside) {
      const value = of(point);
      if (point.first) pen = "M";
      if (isNumber(value)) { path += `${pen}${x(point.t).toFixed(1)} ${y(value).toFixed(1)}`; pen = "L"; } else pen = "M";
    }
    parts.line.setAttribute("d", path);
    parts.frame.setAttribute("d", `M${names} ${top + tall - 1}H${width - values}`);
    parts.zero.setAttribute("d", least < 0 && most > 0 ? across(0) : "");
    parts.limit.setAttribute("d", isNumber(bound) ? across(bound) : "");
    const middle = top + tall / 2 + 4, value = at ? of(at) : undefined;
    const both = unit && tall > 34 ? 7 : 0;  // name and unit, where there is room
    for (const [name, spot, by] of [["name", 0, -both], ["unit", 0, both], ["value", width - EDGE, 0]]) { parts[name].setAttribute("x", spot); parts[name].setAttribute("y", middle + by); }
    parts.unit.setAttribute("visibility", both ? "visible" : "hidden");
    if (limit) put(parts.name, at?.score ? `doubt: ${at.score}` : "doubt");
    put(parts.value, isNumber(value) ? `${limit && isNumber(bound) && value > bound ? "! " : ""}${rounded(value, most - least)}` : "\u2013");
  }
}

// ---------------------------------------------------------------------------------------------------- the timeline

const EVENTS = { "not kept": "the end of the run could not be kept", "no plan": "the planner does not answer, or not with a plan", done: "an instruction is finished", stalled: "nothing moves any more", unsure: "the policy is unsure", help: "the guard calls for help", words: "a person spoke",
                 goal: "another goal", "handed back": "the policy drives again" };
const percent = (value) => isNumber(value) ? `, ${Math.round(100 * value)} % sure` : "";

/** Kind -> (mark, words) of an event. */
const WORDS = {
  run: (event) => [{ done: "\u2713", failed: "\u2715", stopped: "\u25a0" }[event.state] ?? "\u25b6",
    `${event.state}${event.success === true ? ", goal reached" : event.success === false ? ", goal not reached" : ""}: ${event.error || event.goal}`],
  plan: (event) => ["\u2192", `${event.now || "nothing more"}${percent(event.confidence)}${list(event.remaining).length ? `, then ${event.remaining.length} more` : ""}`],
  event: (event) => ["\u2022", `${EVENTS[event.what] ?? event.what}${event.reason ? `: ${event.reason}` : ""}`],
  question: (event) => ["?", `${event.say}: ${isNumber(event.value) ? `${event.score} ${short(event.value)}, above ${short(event.threshold)}` : event.reason}`],
  answer: (event) => ["\u21b5", `${String(event.answer).replaceAll("_", " ")}${event.instruction ? `: ${event.instruction}` : ""}${event.by ? `, by ${event.by}` : ""}`],
  incident: (event) => ["\u25c6", `${event.what}: ${event.reason}`],
};

/** What happened, newest first: a row an event, each opened by a click or Enter. */
export class Timeline {
  #rows = [];
  #origin = Infinity;   // s since 1970 at which the station's own clock was 0, as far as known

  constructor(node, kind, filter, found) {
    Object.assign(this, { node, kind, filter, found });
    for (const input of [kind, filter]) input.addEventListener("input", () => { for (const row of this.#rows) this.#sift(row); this.#count(); this.#reach(); });
    node.addEventListener("keydown", (event) => this.#move(event));
  }

  renew() { this.#origin = Infinity; for (const row of this.#rows) row.fixed = true; }

  /** An event of the station's time `t` came: an old one comes too late, none too early. */
  time(t) {
    const start = Date.now() / 1000 - t, other = start < this.#origin - 0.5;
    this.#origin = Math.min(this.#origin, start);
    if (other) for (const row of this.#rows) this.#stamp(row);
  }

  /** A plan that is said again is no second row: a planner is asked every second. */
  add(event) {
    const [mark, words] = (WORDS[event.kind] ?? (() => ["\u2022", ""]))(event), newest = this.#rows[0];
    if (event.kind !== "plan" || newest?.event.kind !== "plan" || newest.words !== words) { this.#insert(event, mark, words); return; }
    newest.event = event;
    newest.again += 1;
    put(newest.count, ` \u00d7 ${newest.again}`);
    this.#stamp(newest);
    if (newest.details.open) this.#fields(newest);
  }

  /** Something that the page itself saw. */
  local(words) { this.#insert({ kind: "page", at: Date.now() / 1000 }, "\u2013", words); }

  #insert(event, mark, words) {
    const time = make("time"), count = make("small"), summary = make("summary", { tabindex: "-1" }, time, make("span", { class: "mark", "aria-hidden": "true" }, mark),
      make("span", { class: "what" }, make("span", { class: "kind" }, event.kind), " ", words, count));
    const details = make("details", {}, summary), node = make("li", { "data-kind": event.kind }, details);
    const row = { event, words, node, time, count, details, summary, again: 1, fixed: event.at !== undefined, text: `${event.kind} ${words} ${JSON.stringify(event)}`.toLowerCase() };
    if (row.fixed) put(time, clock(event.at));
    details.addEventListener("toggle", () => { if (details.open) this.#fields(row); });
    this.#stamp(row);
    this.#rows.unshift(row);
    this.node.prepend(node);
    if (this.#rows.length > MOST_ROWS) this.#rows.pop().node.remove();
    this.#sift(row);
    this.#count();
    this.#reach();
  }

  #fields(row) {
    row.details.querySelector("dl")?.remove();
    row.details.append(make("dl", {}, ...Object.entries(row.event).map(([key, value]) =>
      make("div", {}, make("dt", {}, key), make("dd", {}, typeof value === "string" ? value : JSON.stringify(value))))));
  }

  #stamp(row) {
    if (!row.fixed) put(row.time, clock(this.#origin + row.event.t));
  }

  #sift(row) {
    const kinds = this.kind.value, words = this.filter.value.trim().toLowerCase();
    row.node.hidden = Boolean((kinds && !kinds.split(" ").includes(row.event.kind)) || !row.text.includes(words));
  }

  #count() {
    const shown = this.#rows.filter((row) => !row.node.hidden).length;
    put(this.found, shown === this.#rows.length ? `${shown} events` : `${shown} of ${this.#rows.length}`);
  }

  /** Tab reaches one row: that of the focus, or the newest. */
  #reach(to = undefined) {
    const shown = this.#rows.filter((row) => !row.node.hidden), held = shown.find((row) => row.summary === document.activeElement);
    const one = to ?? held ?? shown[0];
    for (const row of this.#rows) row.summary.tabIndex = row === one ? 0 : -1;
  }

  #move(event) {
    const shown = this.#rows.filter((row) => !row.node.hidden), at = shown.findIndex((row) => row.summary === event.target);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const row = shown[Math.min(shown.length - 1, Math.max(0, to))];
    this.#reach(row);
    row.summary.focus();
  }
}
