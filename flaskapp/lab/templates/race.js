"use strict";
// Styles are set through the CSSOM and SVG attributes: the page's policy allows no style attribute in markup.
const form = document.getElementById("ask");
const told = document.getElementById("told");
const button = form.querySelector("button");
const sides = Object.fromEntries(["legacy", "atomic"].map(name => [name, document.getElementById(name)]));
const SVG = "http://www.w3.org/2000/svg";
const SHOW_MS = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 700;
let waiting = [];
let overspent = {};
let drawing = false;
let ended = null;

const usd = nano => "$" + (nano / 1e9).toFixed(6).replace(/0+$/, "").replace(/\.$/, "");

function say(text, kind) {
  told.className = "notice" + (kind ? " " + kind : "");
  told.textContent = text;
}

form.addEventListener("submit", async event => {
  event.preventDefault();
  button.disabled = true;
  waiting = []; overspent = { legacy: 0, atomic: 0 }; ended = null;
  for (const side of Object.values(sides)) {
    side.classList.remove("is-over", "is-done");
    side.querySelector(".over").textContent = "$0";
    side.querySelector(".round").textContent = "";
    side.querySelector(".key").textContent = "";
    side.querySelector(".lanes").replaceChildren();
    side.querySelector(".spent").style.width = "0";
  }
  say("The race starts: a Redis of its own comes up …");
  try {
    const answer = await fetch("{{ url_for('admin.race_run') }}", { method: "POST", body: new FormData(form) });
    if (!answer.ok) throw new Error((await answer.json()).message);
    await read(answer.body.getReader());
  } catch (error) {
    ended = { error: error.message || "The service hung up." };
    next();
  }
});

async function read(reader) {
  const decoder = new TextDecoder();
  let rest = "", result = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines.filter(Boolean).map(text => JSON.parse(text))) {
      if (line.round) waiting.push(line.round); else result = line;
    }
    next();
  }
  if (!result) throw new Error("The race ended before its result.");
  // Only now has its process ended, and another race may start.
  ended = result;
  next();
}

// One pair of rounds after another, however fast they come: both sides are drawn at the same time.
function next() {
  if (drawing) return;
  const rounds = waiting.filter(round => round.number === (waiting[0] || {}).number);
  if (ended && !waiting.length) return finish();
  if (!ended && rounds.length < 2) return;
  waiting = waiting.filter(round => !rounds.includes(round));
  drawing = true;
  say("Round " + (rounds[0].number + 1) + " of " + form.elements.rounds.value + " …");
  const longest = Math.max(...rounds.flatMap(round => round.calls.map(call => call.answered_ms)));
  rounds.forEach(begin);
  const started = performance.now();
  requestAnimationFrame(function frame(now) {
    const share = SHOW_MS ? Math.min(1, (now - started) / SHOW_MS) : 1;
    rounds.forEach(round => draw(round, share * longest, longest));
    if (share < 1) return requestAnimationFrame(frame);
    rounds.forEach(close);
    setTimeout(() => { drawing = false; next(); }, SHOW_MS / 2);
  });
}

function begin(round) {
  const side = sides[round.backend];
  let sum = 0;
  for (const call of [...round.calls].sort((one, other) => one.answered_ms - other.answered_ms)) {
    if (call.is_admitted) sum += call.cost_nanousd;
    call.kind = !call.is_admitted ? "no" : sum <= round.limit_nanousd ? "in" : "beyond";
  }
  const all = round.calls.reduce((total, call) => total + call.cost_nanousd, 0);
  round.whole = all;
  side.querySelector(".round").textContent = "· round " + (round.number + 1);
  side.querySelector(".limit").style.left = 100 * round.limit_nanousd / all + "%";
}

function draw(round, until, longest) {
  const svg = sides[round.backend].querySelector(".lanes");
  const tall = 100 / round.calls.length;
  svg.setAttribute("viewBox", "0 0 100 100");
  const bars = [];
  round.calls.forEach((call, row) => {
    const from = 100 * call.asked_ms / longest, to = 100 * Math.min(until, call.answered_ms) / longest;
    if (to <= from) return;
    const is_over = until >= call.answered_ms;
    bars.push(bar(from, to - from, row * tall, tall, is_over ? call.kind : "open"));
    if (call.checked_ms !== null && until > call.checked_ms) {
      const record = Math.max(...round.calls.map(each => each.checked_ms || 0));
      const held_to = 100 * Math.min(until, record) / longest, held_from = 100 * call.checked_ms / longest;
      if (held_to > held_from) bars.push(bar(held_from, held_to - held_from, row * tall, tall, "wait"));
    }
  });
  svg.replaceChildren(...bars);
  const admitted = round.calls.filter(call => call.is_admitted && call.answered_ms <= until);
  show_spent(round, admitted.reduce((total, call) => total + call.cost_nanousd, 0), admitted.length);
}

function bar(x, width, y, tall, kind) {
  const rect = document.createElementNS(SVG, "rect");
  for (const [name, value] of Object.entries({ x, width, y: y + tall * 0.12, height: tall * 0.76, class: kind })) {
    rect.setAttribute(name, value);
  }
  return rect;
}

function show_spent(round, spent, admitted) {
  const side = sides[round.backend];
  const is_over = spent > round.limit_nanousd;
  const strip = side.querySelector(".spent");
  strip.style.width = 100 * spent / round.whole + "%";
  strip.style.setProperty("--share", 100 * round.limit_nanousd / (spent || 1) + "%");
  if (is_over) side.classList.add("is-over");
  side.querySelector(".key").textContent = usd(spent) + " of " + usd(round.limit_nanousd) + " · " + admitted + " of "
    + round.calls.length + " admitted";
}

function close(round) {
  show_spent(round, round.spent_nanousd, round.calls.filter(call => call.is_admitted).length);
  overspent[round.backend] += round.overspend_nanousd;
  sides[round.backend].querySelector(".over").textContent = usd(overspent[round.backend]);
}

function finish() {
  button.disabled = false;
  if (ended.error) return say(ended.error, "bad");
  for (const side of Object.values(sides)) side.classList.add("is-done");
  const trips = Object.fromEntries(ended.backends.map(each => [each.backend, each]));
  say(ended.verdict.replace(/(\.\d*?[1-9])0+(?!\d)/g, "$1").replace(/^./gm, letter => letter.toUpperCase())
    + " Check and record take " + trips.legacy.check_p50_ms.toFixed(1) + " ms and " + trips.legacy.round_trips_a_request.toFixed(0)
    + " round trips the legacy way, " + trips.atomic.check_p50_ms.toFixed(1) + " ms and "
    + trips.atomic.round_trips_a_request.toFixed(0) + " the atomic way.", ended.exit_status ? "bad" : "good");
}
