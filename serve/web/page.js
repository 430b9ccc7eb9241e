// One look in, one chunk out: GET v1/info says what there is to fill in, POST v1/act answers.
//
// Whatever comes from the server or from a user becomes text nodes and attributes, never HTML; the page's headers
// (serve/page.py) make the browser refuse anything else. Addresses are relative, so the page also works below a path.

const $ = (id) => document.getElementById(id);

/** @type {any} What GET v1/info said. */
let info = null;
/** Camera -> {base64, url, words}, of the pictures given so far. */
const pictures = new Map();
/** Camera -> the promise of its picture, while a file is being read. */
const coming = new Map();
/** What is shown: {reply, dims}. */
let shown = null;
let acting = false;

// ---------------------------------------------------------------------------------------------------- elements

function dress(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);  // strings become text nodes
  return node;
}
const make = (tag, attributes = {}, ...children) => dress(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  dress(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** A number for people: at most four digits that count. */
const short = (value) => String(Number(value.toPrecision(4))).replace("-", "\u2212");
const percent = (value) => value === null ? "none" : `${(100 * value).toFixed(1)} %`;
const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

// ---------------------------------------------------------------------------------------------------- the server

/** Why there is no answer, in the server's own form: code, where, found, expected, fix. */
class Refused extends Error {
  constructor(said) { super(said.found); this.said = said; }
}

async function ask(path, body) {
  let response, text;
  const given = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  try {
    response = await fetch(path, given);
    text = await response.text();
  } catch (error) {
    throw new Refused({ code: "unreachable", where: path, found: `no answer (${error.message})`, expected: "a server that runs",
                        fix: "see whether vla serve still runs; smaller pictures, if these are large" });
  }
  let answer = null;
  try { answer = JSON.parse(text); } catch { /* something before the server may speak HTML */ }
  if (response.ok && answer !== null) return answer;
  throw new Refused(answer?.error ?? { code: `HTTP ${response.status}`, where: path, found: text.slice(0, 200) || response.statusText,
                                       expected: "JSON", fix: "see the server's log" });
}

/** Asks what is served until there is something. */
async function learn() {
  for (;;) {
    try {
      info = await ask("v1/info");
      break;
    } catch (refused) {
      const { code, found, retry_after } = refused.said ?? {};
      if (code !== "unavailable" && code !== "unreachable") { refuse(refused); return; }
      $("about").textContent = `Not ready: ${found}. Asking again \u2026`;
      await new Promise((done) => setTimeout(done, 1000 * Math.min(10, Math.max(1, retry_after ?? 2))));
    }
  }
  const robots = Object.keys(info.robots);
  document.title = `${info.name} \u00b7 Tendon`;
  $("name").textContent = info.name;
  $("about").textContent = `${robots.length === 1 ? "One robot" : `${robots.length} robots`}` +
    `${info.adapters.length ? `, ${info.adapters.length} adapters` : ""}; policy ${info.policy.slice(0, 12)}.`;
  choices($("robot"), robots.map((key) => [key, key]));
  choices($("adapter"), [["", "as the server was told"], ...info.adapters.map((name) => [name, name])]);
  $("adapters").hidden = !info.adapters.length;
  $("known").replaceChildren(...info.instructions.map((text) => make("option", { value: text })));
  fill();
}

function choices(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => value === before)) select.value = before;
}

// ---------------------------------------------------------------------------------------------------- what to fill in

const robot = () => info?.robots[$("robot").value];

/** The dimensions of "state" or "action": name, unit, limits where there are any, where to begin. */
const dimensions = (spec, part) => spec[part].flatMap((channel) => channel.dims.map((dim, i) => ({
  name: `${channel.name}.${dim}`, unit: channel.unit && channel.unit !== "1" ? channel.unit : "",
  low: channel.low?.[i], high: channel.high?.[i], start: start(channel, i),
})));

/** Orientations, where the middle of the limits would be none. */
const STRAIGHT = { eef_quat_xyzw: [0, 0, 0, 1], eef_quat_wxyz: [1, 0, 0, 0], eef_rot6d: [1, 0, 0, 0, 1, 0] };
function start(channel, i) {
  const middle = (channel.low?.[i] + channel.high?.[i]) / 2;
  return STRAIGHT[channel.convention]?.[i] ?? (Number.isFinite(middle) ? Number(middle.toPrecision(6)) : 0);
}

const limits = (dim) => dim.low === undefined || dim.high === undefined ? "" : `${short(dim.low)} to ${short(dim.high)}`;
const inputs = () => [...$("state").querySelectorAll("input")];

/** The form for the chosen robot. Pictures of cameras it has as well are kept, and so is a state of the same names. */
function fill() {
  const spec = robot(), dims = dimensions(spec, "state");
  const before = new Map(inputs().map((input) => [input.name, input.value]));
  const same = before.size === dims.length && dims.every((dim) => before.has(dim.name));
  $("cameras").replaceChildren(...Object.entries(spec.cameras).map(place));
  for (const camera of [...pictures.keys()]) {
    if (camera in spec.cameras) preview(camera); else give(camera, null);
  }
  $("state").replaceChildren(...dims.map((dim) => {
    const span = dim.high - dim.low;
    const input = make("input", { type: "number", name: dim.name, min: dim.low, max: dim.high, autocomplete: "off",
                                  step: span > 0 ? 10 ** Math.floor(Math.log10(span / 10)) : "any" });
    input.value = same ? before.get(dim.name) : dim.start;
    return make("label", {}, ...dim.name.split(/(?<=\.)/).flatMap((part, i) => i ? [make("wbr"), part] : part), make("small", {}, [dim.unit, limits(dim)].filter(Boolean).join(", ") || "no limits"), input);
  }));
  $("states").hidden = !dims.length;
}

/** One camera's place: its file input lies over the whole of it, so that all of it can be clicked, tabbed to, dropped upon. */
function place([camera, size], i) {
  const box = make("div", { class: "camera", "data-camera": camera });
  const input = make("input", { type: "file", accept: "image/*", "aria-labelledby": `camera-${i}`, "aria-describedby": `note-${i}` });
  const clear = make("button", { type: "button", hidden: true, "aria-label": `Remove the picture of ${camera}` }, "\u00d7");
  input.addEventListener("change", () => { if (input.files.length) take(camera, input.files[0]); input.value = ""; });
  clear.addEventListener("click", () => { give(camera, null); input.focus(); say(`${camera}: no picture.`); });
  box.append(input, make("div", { class: "drop" }, make("img", { alt: "", hidden: true }), make("strong", { id: `camera-${i}` }, camera),
    make("small", { id: `note-${i}`, "data-empty": `recorded at ${size.width} \u00d7 ${size.height}; any size will do` })), clear);
  preview(camera, box);
  return box;
}

// ---------------------------------------------------------------------------------------------------- pictures

const boxes = () => [...$("cameras").children];

function preview(camera, box = boxes().find((one) => one.dataset.camera === camera)) {
  const picture = pictures.get(camera), image = box?.querySelector("img"), note = box?.querySelector("small");
  if (!box) return;
  box.classList.toggle("full", Boolean(picture));
  box.querySelector("button").hidden = image.hidden = !picture;
  note.textContent = picture?.words ?? note.dataset.empty;
  if (!picture) { image.removeAttribute("src"); return; }
  image.onload = () => {
    image.classList.toggle("small", image.naturalWidth < 200);
    note.textContent = `${image.naturalWidth} \u00d7 ${image.naturalHeight}, ${picture.words}`;
  };
  image.onerror = () => { image.hidden = true; note.textContent = `${picture.words}; this browser cannot show it`; };
  image.src = picture.url;
}

/** `picture` null: none any more. */
function give(camera, picture) {
  if (pictures.has(camera)) URL.revokeObjectURL(pictures.get(camera).url);
  if (picture) pictures.set(camera, picture); else pictures.delete(camera);
  coming.delete(camera);
  preview(camera);
}

async function take(camera, file) {
  const reading = encode(file);
  coming.set(camera, reading);
  try {
    const picture = await reading;
    if (coming.get(camera) !== reading) return;  // another one was given meanwhile
    give(camera, picture);
    say(`${camera}: ${file.name || "a pasted picture"}.`);
  } catch (error) {
    if (coming.get(camera) !== reading) return;
    give(camera, null);  // not the one before: nobody means that one any more
    refuse(new Refused({ code: "no picture", where: `camera ${camera}`, found: `${file.name || "a file"} (${file.type || "of no known type"}): ${error.message}`,
                         expected: "an image this browser can open", fix: "save it as PNG or JPEG" }));
  }
}

/** PNG and JPEG go as they are, byte for byte; what else the browser can open goes as PNG. */
async function encode(file) {
  const head = new Uint8Array(await file.slice(0, 4).arrayBuffer()).join();
  const kind = head === "137,80,78,71" ? "PNG" : head.startsWith("255,216,255") ? "JPEG" : "";
  const blob = kind ? file : await repainted(file);
  const base64 = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
  const size = blob.size < 1e6 ? `${Math.ceil(blob.size / 1e3)} kB` : `${(blob.size / 1e6).toFixed(1)} MB`;
  return { base64, url: URL.createObjectURL(blob), words: `${kind || "as PNG"}, ${size}` };
}

async function repainted(file) {
  const bitmap = await createImageBitmap(file), canvas = make("canvas", { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  if (!blob) throw new Error(`${bitmap.width} \u00d7 ${bitmap.height} pixels are too many for it`);
  return blob;
}

/** Files that were dropped or pasted: the first where it was meant, the others by their names, or where nothing is yet. */
function share(files, meant) {
  let free = boxes().map((box) => box.dataset.camera);
  const empty = (camera) => !pictures.has(camera) && !coming.has(camera);
  for (const file of [...files].slice(0, free.length)) {
    const named = free.find((camera) => file.name.toLowerCase().includes(camera.toLowerCase()));
    const camera = (free.includes(meant) && meant) || named || free.find(empty) || free[0];
    free = free.filter((one) => one !== camera);
    meant = undefined;
    take(camera, file);
  }
}

const cameraAt = (target) => target instanceof Element ? target.closest(".camera")?.dataset.camera : undefined;

function hover(camera) {
  for (const box of boxes()) box.classList.toggle("over-it", box.dataset.camera === camera);
}

// Everywhere, since a file dropped beside its place would otherwise replace the page.
addEventListener("dragover", (event) => { event.preventDefault(); hover(cameraAt(event.target)); });
addEventListener("dragleave", () => hover());
addEventListener("drop", (event) => {
  event.preventDefault();
  hover();
  if (event.dataTransfer.files.length) share(event.dataTransfer.files, cameraAt(event.target));
  else say("That was no file: save the picture first, or copy and paste it.");
});
addEventListener("paste", (event) => {
  const images = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  const text = event.clipboardData.getData("text"), numbers = text.match(/[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?/gi) ?? [];
  const fields = inputs(), at = fields.indexOf(event.target);
  if (images.length) {
    share(images, cameraAt(event.target));
  } else if (at >= 0 && numbers.length > 1) {  // a whole state, as a log or a terminal has it
    numbers.slice(0, fields.length - at).forEach((value, i) => { fields[at + i].value = Number(value); });
    say(`${Math.min(numbers.length, fields.length - at)} numbers of the state pasted.`);
  } else return;
  event.preventDefault();
});

// ---------------------------------------------------------------------------------------------------- asking

const say = (text) => { $("news").textContent = text; };

async function act() {
  if (acting || !info) return;
  acting = true;
  $("act").setAttribute("aria-disabled", "true");  // not disabled: that would take the focus away
  try {
    await Promise.allSettled(coming.values());
    const spec = robot(), body = { robot: $("robot").value, instruction: $("instruction").value, state: state(), images: {} };
    for (const [camera, picture] of pictures) body.images[camera] = picture.base64;
    if ($("adapter").value) body.adapter = $("adapter").value;
    const began = performance.now(), reply = await ask("v1/act", body), ms = performance.now() - began;
    show(reply, spec, ms);
    if (reply.policy !== info.policy) learn();  // swapped meanwhile
  } catch (error) {
    refuse(error);
  } finally {
    acting = false;
    $("act").removeAttribute("aria-disabled");
  }
}

function state() {
  const fields = inputs(), wrong = fields.filter((input) => !Number.isFinite(input.valueAsNumber));
  for (const input of fields) input.toggleAttribute("aria-invalid", wrong.includes(input));
  if (wrong.length) {
    wrong[0].focus();
    throw new Refused({ code: "state", where: wrong.map((input) => input.name).join(", "), found: "no number", expected: "a number in each field",
                        fix: "fill it in" });
  }
  return fields.map((input) => input.valueAsNumber);
}

function refuse(error) {
  const said = error.said ?? { code: "page", where: "this page", found: String(error), expected: "no error", fix: "load it again" };
  const again = said.retry_after === undefined ? [] : [["try again in", `${said.retry_after} s`]];
  const rows = [...["where", "found", "expected", "fix"].map((name) => [name, said[name]]), ...again];
  $("chunk").hidden = true;
  $("said").textContent = "";
  $("refused").replaceChildren(make("div", { class: "banner bad" }, make("strong", {}, `No answer: ${said.code}`), pairs(rows)));
  reveal();
}

const pairs = (rows) =>
  make("dl", {}, ...rows.map(([term, text]) => make("div", {}, make("dt", {}, term), make("dd", {}, String(text)))));

// ---------------------------------------------------------------------------------------------------- the answer

function show(reply, spec, ms) {
  const known = new Map(dimensions(spec, "action").map((dim) => [dim.name, dim]));
  const dims = reply.names.map((name) => known.get(name) ?? { name, unit: "" });
  shown = { reply, dims };
  $("refused").replaceChildren();
  $("held").replaceChildren(...held(reply));
  const { execute, control_hz: hz, timing } = reply, steps = reply.actions.length;
  $("facts").replaceChildren(...pairs([
    ["answered by", `${info.name}, ${reply.policy.slice(0, 12)}`], ["carry out", `${execute} of ${steps} steps, ${short(execute / hz)} s`],
    ["rate", `${short(hz)} Hz`], ["here and back", milliseconds(ms)], ["in the server", milliseconds(timing.serve)],
    ["waited", milliseconds(timing.wait)], ["policy", `${milliseconds(timing.infer)}, ${reply.batch === 1 ? "alone" : `batch of ${reply.batch}`}`],
  ]).childNodes);
  $("key").replaceChildren(...[["limit", "limits"], ["again", `${execute} steps carried out, then the robot looks again`]].map(([tone, text]) =>
    make("span", { class: "entry" }, draw("svg", { width: 22, height: 6, "aria-hidden": "true" }, draw("line", { class: tone, x2: 22, y1: 3, y2: 3 })), text)));
  $("said").textContent = summary(reply, dims, steps, ms);
  $("lines").replaceChildren(...dims.map(panel));
  $("confidence").replaceChildren(confidence());
  $("numbers").replaceChildren(numbers());
  $("readout").textContent = "Point at a step, or choose one with the arrow keys.";
  $("chunk").hidden = false;
  reveal();
}

/** On a narrow screen the answer is below what was filled in. The focus stays where it is. */
function reveal() {
  if ($("answer").getBoundingClientRect().top > innerHeight - 80) $("answer").scrollIntoView();
}

function held({ hold, reason, needs_help: help }) {
  const list = (text) => make("ul", {}, ...text.split("; ").map((line) => make("li", {}, line)));
  return [
    ...hold ? [make("div", { class: "banner" }, make("strong", {}, "Hold: what the policy said was not passed on; these steps stand still."), list(reason))] : [],
    ...help ? [make("div", { class: "banner bad" }, make("strong", {}, "Needs help: the robot holds until somebody looked."), list(help))] : [],
  ];
}

function summary(reply, dims, steps, ms) {
  let sum = 0, count = 0, least = null;
  reply.confidence.forEach((row, t) => row.forEach((value, d) => {
    if (value === null) return;
    sum += value; count += 1;
    if (least === null || value < least.value) least = { value, t, d };
  }));
  const sure = count ? ` Confidence ${percent(sum / count)} on average, least ${percent(least.value)}: ${dims[least.d].name} at step ${least.t}.`
    : " This policy says nothing of its confidence.";
  return `${reply.hold ? "Hold." : `${steps} steps in ${milliseconds(ms)}.`}${sure}`;
}

const WIDTH = 320, HEIGHT = 132, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 22;

/** About `count` round numbers inside [low, high]. */
function ticks(low, high, count) {
  const raw = (high - low) / count, scale = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * scale).find((m) => m >= raw * 0.999), all = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) all.push(Number((k * step).toPrecision(10)));
  return all;
}

/** One dimension over time. A step is told to the robot and lasts until the next, so the line is one of stairs. */
function panel(dim, d) {
  const { actions, execute, control_hz: hz } = shown.reply, values = actions.map((row) => row[d]), steps = values.length;
  const least = Math.min(...values), most = Math.max(...values), bounded = dim.low !== undefined && dim.high !== undefined;
  let [low, high] = bounded && !$("near").checked ? [dim.low, dim.high] : [least, most];
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  [low, high] = [low - room, high + room];
  const x = (step) => LEFT + step / steps * (WIDTH - LEFT - RIGHT), y = (v) => HEIGHT - BOTTOM - (v - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const flat = (name, v) => draw("line", { class: name, x1: LEFT, x2: WIDTH - RIGHT, y1: y(v), y2: y(v) });
  const parts = [], at = (v, text) => draw("text", { x: LEFT - 5, y: y(v) + 4, "text-anchor": "end" }, text);
  const edges = bounded ? [dim.low, dim.high].filter((v) => v >= low && v <= high) : [];
  const clear = (v) => edges.every((edge) => Math.abs(y(edge) - y(v)) > 12);
  for (const v of ticks(low, high, 3).filter(clear)) parts.push(flat("grid", v), at(v, short(v)));
  for (const v of edges) parts.push(flat("limit", v), at(v, short(v)));
  for (const s of ticks(0, steps / hz, 4)) {
    parts.push(draw("text", { x: x(s * hz), y: HEIGHT - 7, "text-anchor": s * hz > steps * 0.95 ? "end" : "middle" }, s === 0 ? "0 s" : short(s)));
  }
  const stairs = (from, to) => values.slice(from, to).flatMap((v, i) => [[from + i, v], [from + i + 1, v]]).map(([s, v]) => `${x(s)},${y(v)}`).join(" ");
  if (execute < steps) parts.push(draw("polyline", { class: "later", points: stairs(Math.max(0, execute - 1), steps) }));
  parts.push(draw("polyline", { points: stairs(0, execute) }));
  parts.push(draw("line", { class: "again", x1: x(Math.min(execute, steps)), x2: x(Math.min(execute, steps)), y1: TOP, y2: HEIGHT - BOTTOM }));
  parts.push(draw("rect", { class: "cross", y: TOP, height: HEIGHT - TOP - BOTTOM, width: x(1) - x(0) }));
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "data-steps": steps,
    "aria-label": `${dim.name} from ${short(values[0])} to ${short(values[steps - 1])} ${dim.unit}, between ${short(least)} and ${short(most)}` +
      `${bounded ? `, limits ${limits(dim)}` : ""}, over ${short(steps / hz)} s` }, ...parts);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), px = (event.clientX - box.left) / box.width * WIDTH;
    point(Math.floor((px - LEFT) / (WIDTH - LEFT - RIGHT) * steps));
  });
  const words = [dim.unit && `[${dim.unit}]`, bounded ? limits(dim) : "no limits"].filter(Boolean).join(" ");
  return make("figure", {}, make("figcaption", {}, `${dim.name} `, make("small", {}, words)), svg);
}

/** H x A: the heat map, whose cells say their numbers to whoever reads instead of looks. */
function confidence() {
  const { reply, dims } = shown, steps = reply.confidence.length;
  const heads = reply.confidence.map((_, t) => make("th", { scope: "col", class: t === reply.execute && "first" }, String(t)));
  const rows = dims.map((dim, d) => make("tr", {}, make("th", { scope: "row" }, dim.name), ...reply.confidence.map((row, t) => {
    const value = row[d], words = `${dim.name}, step ${t}: ${percent(value)}`;
    const cell = make("td", { title: words, "data-step": t, "data-dim": d, "data-value": value ?? "none", class: value === null && "none" },
                      value === null ? "\u2013" : String(Math.round(100 * value)));
    cell.style.setProperty("--c", value ?? 0);
    if (t === reply.execute) cell.classList.add("first");
    return cell;
  })));
  const heat = make("table", { class: steps > 24 ? "heat dense" : "heat" },
    make("caption", {}, "Per cent, of each step (columns) and dimension (rows); the stronger the colour, the surer."),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "step"), ...heads)), make("tbody", {}, ...rows));
  heat.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("td");
    if (cell) point(Number(cell.dataset.step), Number(cell.dataset.dim));
  });
  return heat;
}

function numbers() {
  const { reply, dims } = shown;
  return make("table", {}, make("caption", {}, "Robot units, a row a step."),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "step"), make("th", { scope: "col" }, "s"),
      ...dims.map((dim) => make("th", { scope: "col" }, dim.name)))),
    make("tbody", {}, ...reply.actions.map((row, t) => make("tr", {}, make("th", { scope: "row" }, String(t)),
      make("td", {}, short(t / reply.control_hz)), ...row.map((value) => make("td", { "data-value": value }, short(value)))))));
}

/** Show step `t` everywhere, and say its numbers, or those of dimension `d` alone. */
function point(t, d) {
  const { reply, dims } = shown, steps = reply.actions.length;
  t = Math.min(steps - 1, Math.max(0, t));
  shown.at = t;
  for (const cross of $("lines").querySelectorAll(".cross")) {
    cross.setAttribute("x", LEFT + t / steps * (WIDTH - LEFT - RIGHT));
    cross.style.visibility = "visible";
  }
  for (const cell of $("confidence").querySelectorAll("td")) cell.classList.toggle("at", Number(cell.dataset.step) === t && (d === undefined || Number(cell.dataset.dim) === d));
  const words = dims.map((dim, i) => `${dim.name} ${short(reply.actions[t][i])} (${percent(reply.confidence[t][i])})`);
  $("readout").textContent = `step ${t}, ${short(t / reply.control_hz)} s: ${d === undefined ? words.join(", ") : `${words[d]} ${dims[d].unit && `[${dims[d].unit}]`}`}`;
}

$("lines").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || !shown) return;
  event.preventDefault();
  point((shown.at ?? (by > 0 ? -1 : 1)) + by);
});
$("near").addEventListener("change", () => {
  $("lines").replaceChildren(...shown.dims.map(panel));
  if (shown.at !== undefined) point(shown.at);
});
$("robot").addEventListener("change", fill);
$("look").addEventListener("submit", (event) => { event.preventDefault(); act(); });
learn();
