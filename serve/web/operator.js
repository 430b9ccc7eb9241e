// The operator's page of a station: GET v1/station says how things are, v1/station/events what happened, and a person's
// word goes to run, say, answer and stop.
//
// Whatever comes from the station or from a user becomes text nodes and attributes, never HTML; the page's headers
// (serve/page.py) make the browser refuse anything else. What is shown as the state is always a snapshot: an event only makes
// the page ask for a new one, so a lost event costs a line of the timeline and never a wrong state.

import { $, isNumber, lasting, list, make, put, short, sleep, tenth, milliseconds, clock, Cameras, Plots, Timeline } from "./operator_views.js";

const PATIENCE = 5000;    // ms an answer is waited for
const PACE = 1000;        // ms between two looks at the station where nothing happens

/** @type {any} The newest snapshot. */
let now = null;
let lost = 0;             // since when nobody answers, ms; 0: somebody does
let seen = 0;             // number of the newest event
let era = 0;              // counts the stations met: one that was started again counts anew
const cameras = new Cameras($("cameras")), plots = new Plots($("strips")), timeline = new Timeline($("timeline"), $("kind"), $("filter"), $("found"));

// ---------------------------------------------------------------------------------------------------- the station

/** Why there is no answer, in the station's own form: code, where, found, expected, fix. */
class Refused extends Error {
  constructor(said) { super(said.found); this.said = said; }
}

async function ask(path, body) {
  let response, text;
  const given = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), priority: "high" };
  try {
    response = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE), ...given });
    text = await response.text();
  } catch (error) {
    throw new Refused({ code: "unreachable", where: path, found: `no answer (${error.message})`, expected: "a station that runs",
                        fix: "see whether vla operate still runs, and the network between" });
  }
  let answer = null;
  try { answer = JSON.parse(text); } catch { /* something before the station may speak HTML */ }
  if (response.ok && answer !== null) return answer;
  throw new Refused(answer?.error ?? { code: `HTTP ${response.status}`, where: path, found: text.slice(0, 200) || response.statusText,
                                       expected: "JSON", fix: "see the station's log" });
}

let begun = 0, applied = 0;

/** Ask for a snapshot, or send `body` and be told one. One that was overtaken by a later question is not shown. */
async function look(path = "v1/station", body = undefined) {
  const mine = begun += 1, before = seen, mineEra = era, snapshot = await ask(path, body);
  if (mine < applied) return;
  applied = mine;
  if (snapshot.last < before && mineEra === era) startedAgain();
  show(snapshot);
  mended();
}

let wake = () => {};
const soon = () => wake();

async function watch() {
  for (;;) {
    const woken = new Promise((done) => { wake = done; });
    try {
      await look();
      listen();
    } catch (error) {
      if (error.said?.code === "unreachable" || !now) missed(error); else complain(error);
    }
    await Promise.race([sleep(PACE), woken]);
    await sleep(60);  // events come in groups
  }
}

function missed(error) {
  if (!lost) lost = Date.now();
  stream?.close();
  stream = null;
  document.body.classList.add("old");
  cameras.renew(true);
  put($("link").lastElementChild, "no connection");
  put($("link").firstElementChild, "\u2715");
  if (!$("lost").firstChild) {
    $("lost").replaceChildren(make("div", { class: "banner bad" }, make("strong", {}, `No connection to the station since ${clock(lost / 1000)}. What you see is old.`),
      "The robot does as it was told last; a stop from here may not arrive. Trying again every second\u2026 ", make("small", {}, error.said?.found ?? String(error))));
  }
  title();
}

function mended() {
  if (stopWanted) stop();
  if (!lost) return;
  say(`The station answers again, after ${lasting((Date.now() - lost) / 1000)}.`);
  timeline.local(`The page heard nothing for ${lasting((Date.now() - lost) / 1000)}`);
  lost = 0;
  cameras.renew(false);
  document.body.classList.remove("old");
  $("lost").replaceChildren();
  title();
}

/** Its events count from 1 again, and so do its frames. What was heard of the one before stays in the timeline. */
function startedAgain() {
  era += 1;
  seen = 0;
  cameras.renew(Boolean(lost));
  plots.clear();
  timeline.renew();
  stream?.close();
  stream = null;
  timeline.local("Another station answers: it was started again");
}

/** @type {EventSource | null} */
let stream = null;

/** Hear what happens from the newest event on. One that breaks is opened again by the next look that is answered. */
function listen() {
  if (stream) return;
  const mine = stream = new EventSource(`v1/station/events?after=${seen}`);
  mine.addEventListener("open", () => { put($("link").lastElementChild, "live"); put($("link").firstElementChild, "\u25cf"); });
  mine.addEventListener("error", () => { mine.close(); if (stream === mine) stream = null; });
  mine.addEventListener("message", (message) => {
    if (stream !== mine) return;
    let event = null;
    try { event = JSON.parse(message.data); } catch { return; }
    const number = Number(message.lastEventId) || 0;  // a question has a number of its own
    if (!isNumber(event?.t) || number <= seen) return;
    seen = number;
    heard(event);
  });
}

function heard(event) {
  timeline.time(event.t);
  if (event.kind === "tick") { plots.add(event); return; }
  timeline.add(event);
  soon();
}

// ---------------------------------------------------------------------------------------------------- the state

const STATES = { idle: ["\u25cb", "idle"], running: ["\u25b6", "running"], asking: ["?", "asks you"], done: ["\u2713", "done"],
                 stopped: ["\u25a0", "stopped"], failed: ["\u2715", "failed"] };
const active = () => now?.run.state === "running" || now?.run.state === "asking";

function show(snapshot) {
  const before = now;
  now = snapshot;
  const { run, robot, loop, incidents } = now, [mark, word] = STATES[run.state] ?? ["\u2022", String(run.state)];
  put($("name"), now.name);
  put($("robot"), `${robot.key}, ${short(robot.hz)} Hz`);
  $("how").dataset.state = run.state;
  put($("how").firstElementChild, mark);
  put($("how").lastElementChild, run.state === "done" && isNumber(Number(run.success)) && run.success !== null ? `${word}, ${run.success ? "goal reached" : "goal not reached"}` : word);
  put($("counts"), run.number ? `run ${run.number}, step ${run.step}, ${tenth(run.seconds)} s` : "no run yet");
  const [kind, why] = doing(run);
  put($("hold"), why);
  $("hold").dataset.kind = kind;
  if (JSON.stringify(before?.robot) !== JSON.stringify(robot)) { cameras.place(list(robot.cameras)); plots.place(list(robot.action), robot.hz); }
  showForm();
  showPlan(run);
  showQuestion(now.question);
  offerBack(active() && run.by === "person");
  plots.describe();
  const facts = [["jitter p50, p99", `${milliseconds(loop.jitter_ms_p50)}, ${milliseconds(loop.jitter_ms_p99)} ms`], ["missed ticks", `${loop.missed} of ${loop.ticks}`],
    ["planner p50", `${milliseconds(loop.planner_ms_p50)} ms`], ["incidents", `${incidents.written}${incidents.lost ? `, ${incidents.lost} lost!` : ""}`],
    ["corrections", String(incidents.corrections)], ["kept in", incidents.folder.split("/").slice(-2).join("/"), incidents.folder]];
  if ($("facts").children.length !== facts.length) $("facts").replaceChildren(...facts.map(([term]) => make("div", {}, make("dt", {}, term), make("dd"))));
  facts.forEach(([, text, whole], i) => { put($("facts").children[i].lastElementChild, text); $("facts").children[i].lastElementChild.title = whole ?? text; });
  title();
}

/** What the robot does just now, and why nothing where it does nothing: [kind, words]. */
function doing({ state, error, hold, by, instruction }) {
  if (state === "failed") return ["bad", `Failed: ${error}`];
  if (!active()) return ["", "Nothing runs: the robot holds."];
  if (state === "asking") return ["held", "Holds until you answer."];
  if (hold) return ["held", `Holds: ${hold}`];
  if (by === "person") return ["held", `A demonstrator drives: ${instruction}`];
  if (by === "retreat") return ["held", "Moves back to where it was safe."];
  return ["", `Moves: ${instruction}`];
}

function title() {
  const [mark, word] = STATES[now?.run.state] ?? ["", ""];
  document.title = `${lost ? "\u2715 no connection" : `${mark} ${word}`} \u00b7 ${now?.name ?? "Station"}`;
}

function showPlan({ plan, instruction, valid_for: valid }) {
  const left = now.run.state === "done" ? ["done", "\u2713"] : active() ? ["now", "\u25b6"] : ["left off", "\u25a0"];
  const all = [...list(plan.done).map((text) => ["done", "\u2713", text]), ...plan.now ? [[...left, plan.now]] : [], ...list(plan.remaining).map((text) => ["next", "\u25cb", text])];
  const key = JSON.stringify(all);
  if ($("steps").dataset.key !== key) {
    $("steps").dataset.key = key;
    $("steps").replaceChildren(...all.map(([part, mark, text]) => make("li", { "data-part": part, "aria-current": part === "now" && "step" },
      make("span", { class: "mark", "aria-hidden": "true" }, mark), make("span", { class: "what" }, text), make("small", {}, part))));
    const at = $("steps").querySelector("[data-part=now]");
    if (at) $("steps").scrollTop = at.offsetTop - $("steps").offsetTop - 30;
  }
  const told = active() && instruction && instruction !== plan.now ? `told: ${instruction}` : "";
  put($("plan-facts"), [all.length && `${all.filter(([part]) => part === "done").length} of ${all.length} done`, isNumber(plan.confidence) && `${Math.round(100 * plan.confidence)} % sure`,
    active() && isNumber(valid) && `valid ${tenth(Math.max(0, valid))} s`].filter(Boolean).join(", "));
  put($("plan-why"), [now.run.goal ? `Goal: ${now.run.goal}` : "No goal yet.", told, plan.reason].filter(Boolean).join(" \u00b7 "));
}

// ---------------------------------------------------------------------------------------------------- a person's word

const say = (text) => put($("news"), text);
let meant = null;         // whether what is being typed was begun while a run went on

function showForm() {
  const going = active();
  put($("speak").querySelector("label"), going ? "Say something to the planner" : "Goal");
  put($("send"), going ? "Say" : "Run");
  $("scene").hidden = going;
  const options = going ? now.instructions : now.goals, key = JSON.stringify(options);
  if ($("known").dataset.key === key) return;
  $("known").dataset.key = key;
  $("known").replaceChildren(...options.map((text) => make("option", { value: text })));
}

$("words").addEventListener("input", () => { meant = $("words").value === "" ? null : meant ?? active(); });
$("speak").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("words").value.trim(), going = active(), scene = $("scene").value.trim();
  if (!now || lost) { say("Not sent: there is no connection to the station."); return; }
  if (!text) { say(going ? "Type what the planner should hear." : "Type a goal first."); $("words").focus(); return; }
  if (meant !== null && meant !== going) {  // a word to a run must not become the goal of the next by itself
    meant = going;
    say(going ? "A run began meanwhile: press Enter again to say this to it." : "The run ended meanwhile: press Enter again to make this the next goal.");
    return;
  }
  if (!going && scene && !/^\d+$/.test(scene)) { say("A scene is a whole number, or nothing."); $("scene").focus(); return; }
  say(going ? "Saying it\u2026" : "Starting\u2026");
  const sent = going ? ["v1/station/say", { words: text }] : ["v1/station/run", { goal: text, ...scene && { scene: Number(scene) } }];
  if (!await tell(...sent)) return;
  say(going ? `Said: ${text}` : `Goal: ${text}`);
  if ($("words").value.trim() === text) { $("words").value = ""; meant = null; }
  if (asked) $("question").focus();
});

/** Whether it arrived and was accepted. */
async function tell(path, body) {
  try {
    try {
      await look(path, body);
    } catch (error) {  // a run that has ended a moment ago may still be putting its things away
      if (error.said?.code !== "conflict" || body.goal === undefined || active()) throw error;
      await sleep(400);
      await look(path, body);
    }
    $("trouble").replaceChildren();
    return true;
  } catch (error) {
    complain(error);
    say("");
    soon();
    return false;
  }
}

function complain(error, before = "") {
  const { code, where, found, expected, fix } = error.said ?? { code: "page", where: "this page", found: String(error), expected: "no error", fix: "load it again" };
  const close = make("button", { type: "button", "aria-label": "Dismiss" }, "\u00d7");
  close.addEventListener("click", () => { $("trouble").replaceChildren(); $("words").focus(); });
  $("trouble").replaceChildren(make("div", { class: "banner bad" }, close, make("strong", {}, `${before || "Refused"}: ${found}`),
    make("span", { class: "muted" }, `${code}, ${where}; expected ${expected}; ${fix}`)));
}

let stopWanted = false;

/** Always sent, whatever the page believes. One that did not arrive is sent again as soon as the station answers. */
async function stop() {
  const going = active();
  stopWanted = false;
  say("Stopping\u2026");
  try {
    await look("v1/station/stop", {});
    $("trouble").replaceChildren();
    say(active() ? "Told to stop; it has not ended yet." : going ? "Stopped." : "Nothing ran; told to stop all the same.");
  } catch (error) {
    stopWanted = error.said?.code === "unreachable";
    complain(error, "The stop did not arrive. Use the robot's own emergency stop");
    say(stopWanted ? "Not stopped: it is sent again as soon as the station answers." : "Not stopped.");
    soon();
  }
}
$("stop").addEventListener("click", stop);

/** The key for it is no text, so the focus must not be where text goes, unless something is being typed. */
function offerBack(possible) {
  if ($("back").hidden === !possible) return;
  const at = document.activeElement, free = at === document.body || (at === $("words") && at.value === "");
  $("back").hidden = !possible;
  if (possible && free) $("back").focus();
  if (!possible && at === $("back")) $("words").focus();
}

async function handBack() {
  if (await tell("v1/station/hand_back", {})) say("Handed back: the policy goes on.");
}
$("back").addEventListener("click", handBack);

/** Whether keys are text just now. */
const typing = (node) => node instanceof HTMLInputElement || node instanceof HTMLSelectElement;

addEventListener("keydown", (event) => {
  if (event.isComposing || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const { key, target } = event;
  if (key === "Escape") { event.preventDefault(); stop(); return; }
  if (typing(target)) return;
  if (key === " " && !target.closest("button, summary, a")) { event.preventDefault(); stop(); return; }
  if (key.toLowerCase() === "h" && !$("back").hidden) { event.preventDefault(); handBack(); return; }
  const button = asked && $("answers").querySelector(`button[data-key="${CSS.escape(key)}"]`);
  if (button) { event.preventDefault(); answer(button.value); }
});

// ---------------------------------------------------------------------------------------------------- the hand-off

/** Answer -> (key, words, what it does). The key of an answer is always the same, so that the hand can learn it. */
const ANSWERS = { go_on: ["1", "Go on", "it may do as it meant to"], instruct: ["2", "Tell it", "another instruction, then it goes on"],
                  take_over: ["3", "Take over", "a demonstrator does this part"], retreat: ["4", "Move back", "to where it is safe, then ask again"],
                  stop: ["5", "End run", "the robot holds"] };
const SAYS = { ask: "The robot asks you", hold: "The robot stands still", retreat: "The robot moved back", help: "The guard calls for help" };
/** What a score that is too high means, for whoever has not read how it is made. */
const WHY = { entropy: "It is much less certain of its next moves than in runs that went well.", entropy_max: "Of one part of its next moves it is much less certain than in runs that went well.",
              overlap: "It keeps changing its mind about what to do next.", spread: "Asked several times, it wants to do different things.", stac: "Its plans from one look to the next do not fit together.",
              fused: "Its signs of doubt together look like those of the runs that failed.", distance: "What it sees is unlike what it has learned from.", learned: "To it this looks like the runs that failed.",
              drill: "A drill: it asks every so many looks, for you to practise." };

let asked = null, came = null;  // the open question as it is shown, and what had the focus before

function showQuestion(question) {
  const key = question && `${era} ${question.number} ${list(question.answers)}`;
  if (asked?.key !== key) {
    if (asked && !question) closed(); else if (question) opened(question, key);
  }
  if (question) put($("ask-open"), `open ${lasting(question.seconds ?? 0)}`);
}

function opened(question, key) {
  const active = document.activeElement, busy = typing(active) && active.value !== "" && active !== $("answers").elements.instruction;
  if (!asked) came = active;
  asked = { key, number: question.number };
  const plain = WHY[question.score] ?? "";
  put($("ask-title"), SAYS[question.say] ?? `The robot asks: ${question.say}`);
  const measured = isNumber(question.value) && isNumber(question.threshold) && question.threshold > 0;
  $("ask-why").replaceChildren(...plain ? [plain, " "] : [], ...question.instruction ? ["It was told: ", make("strong", {}, question.instruction), ". "] : [],
    ...plain && measured ? [] : [make("span", { class: "reason" }, question.reason)]);  // the numbers are drawn below
  $("ask-why").title = question.reason;
  $("ask-meter").hidden = !measured;
  if (measured) {
    const most = 1.25 * Math.max(question.value, question.threshold), at = 100 * question.threshold / most;
    $("ask-bar").setAttribute("width", String(Math.max(0, 100 * question.value / most)));
    $("ask-limit").setAttribute("d", `M${at} 0V8`);
    put($("ask-value"), `${question.score} ${short(question.value)}, asks above ${short(question.threshold)}`);
  }
  $("answers").replaceChildren(...offers(list(question.answers)));
  $("question").dataset.number = question.number;
  $("question").hidden = false;
  const words = `${$("ask-title").textContent}. ${plain || question.reason}`;
  put($("call"), busy ? `${words} Your typing is kept; Tab leads to the answers.` : words);
  if (!busy) $("question").focus();
}

function offers(answers) {
  const known = Object.keys(ANSWERS).filter((name) => answers.includes(name)), other = answers.filter((name) => !(name in ANSWERS));
  return [...known, ...other].map((name, i) => {
    const [key, words, does] = ANSWERS[name] ?? [String(6 + i - known.length), name, ""];
    const button = make("button", { type: name === "instruct" ? "submit" : "button", value: name, "data-key": key, "aria-keyshortcuts": key, title: does },
      make("kbd", {}, key), make("span", {}, words));
    if (name !== "instruct") { button.addEventListener("click", () => answer(name)); return button; }
    return make("div", { class: "tell" }, button, make("input", { name: "instruction", list: "instructions", autocomplete: "off", spellcheck: "false",
      enterkeyhint: "send", "aria-label": "Another instruction", placeholder: "another instruction" }),
      make("datalist", { id: "instructions" }, ...now.instructions.map((text) => make("option", { value: text }))));
  });
}
$("answers").addEventListener("submit", (event) => { event.preventDefault(); answer("instruct"); });

async function answer(name) {
  if (!asked || asked.sent) return;
  const body = { question: asked.number, answer: name }, field = $("answers").elements.instruction, mine = asked;
  if (name === "instruct") {
    body.instruction = field.value.trim();
    if (!body.instruction) { field.focus(); say("Type the instruction, then Enter."); return; }
  }
  mine.sent = true;
  $("answers").classList.add("sent");
  if (await tell("v1/station/answer", body)) say(`Answered: ${ANSWERS[name]?.[1] ?? name}${body.instruction ? `, ${body.instruction}` : ""}.`);
  mine.sent = false;
  $("answers").classList.remove("sent");
}

function closed() {
  const inside = $("question").contains(document.activeElement);
  asked = null;
  $("question").hidden = true;
  put($("call"), "");
  if (inside) (came?.isConnected && came !== document.body ? came : $("words")).focus();
}

watch();
