// The chat page. All that is shown is text: nothing a model says becomes markup.
"use strict";

const $ = (id) => document.getElementById(id);
const memory = window.sessionStorage; // of this tab alone, and gone with it
const KEY = "sparkctl.key";
const TALK = "sparkctl.talk";
const CHOICES = "sparkctl.choices";

let turns = [];
let running = null; // the AbortController of the answer that is being written

// ---- the key: once from the address that `sparkctl tunnel` prints, whose fragment no server ever sees

function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    memory.setItem(KEY, given);
    history.replaceState(null, "", location.pathname);
  }
}

function askForKey() {
  if (!$("door").open) $("door").showModal();
}

// ---- talking to the server

function request(path, options = {}) {
  const headers = { Authorization: `Bearer ${memory.getItem(KEY) || ""}` };
  if (options.body) headers["Content-Type"] = "application/json";
  return fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
}

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function connect() {
  try {
    const response = await request("v1/models");
    if (response.status === 401) {
      state("needs its key", "down");
      askForKey();
      return;
    }
    if (!response.ok) throw new Error(await problemOf(response));
    const { data } = await response.json();
    const wanted = choices().model;
    $("model").replaceChildren(...data.map((model) => new Option(model.id, model.id, false, model.id === wanted)));
    state("ready", "up");
    document.title = `${data[0].id} · sparkctl`;
  } catch {
    state("not reachable", "down");
    setTimeout(connect, 3000);
  }
}

function state(text, kind) {
  $("state").textContent = text;
  $("state").className = `state ${kind}`;
}

// ---- what is remembered

function choices() {
  try {
    return JSON.parse(memory.getItem(CHOICES)) || {};
  } catch {
    return {};
  }
}

function keepChoices() {
  const kept = { model: $("model").value };
  for (const id of ["system", "temperature", "longest"]) kept[id] = $(id).value;
  memory.setItem(CHOICES, JSON.stringify(kept));
}

function keepTalk() {
  try {
    memory.setItem(TALK, JSON.stringify(turns));
  } catch {
    // The tab's memory is full: the conversation goes on, and is forgotten with the tab.
  }
}

function restore() {
  for (const id of ["system", "temperature", "longest"]) $(id).value = choices()[id] || "";
  try {
    turns = JSON.parse(memory.getItem(TALK)) || [];
  } catch {
    turns = [];
  }
  for (const turn of turns) show(turn);
  scroll(true);
}

// ---- showing

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function write(into, text) {
  // Code between fences stands in a box of its own; everything else is shown as it was written.
  into.replaceChildren();
  text.split(/^```[^\n]*\n?/m).forEach((part, index) => {
    if (index % 2) into.append(element("pre", "", part.replace(/\n$/, "")));
    else if (part) into.append(document.createTextNode(part.replace(/^\n|\n$/g, index ? "" : "$&")));
  });
}

function show(turn) {
  $("empty").hidden = true;
  const place = element("article", turn.role === "user" ? "turn mine" : "turn theirs");
  const thought = element("details", "thought");
  const thinking = element("div", "text");
  thought.append(element("summary", "", "Thoughts"), thinking);
  const text = element("div", "text");
  const facts = element("p", "facts");
  if (turn.role !== "user") place.append(thought);
  place.append(text);
  if (turn.role !== "user") place.append(facts);
  $("talk").append(place);
  const update = () => {
    write(text, turn.content);
    thought.hidden = !turn.thought;
    thinking.textContent = turn.thought || "";
    facts.textContent = turn.facts || "";
    facts.classList.toggle("problem", Boolean(turn.problem));
  };
  update();
  return { place, update };
}

function scroll(always = false) {
  const talk = $("talk");
  const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120;
  if (always || atEnd) talk.scrollTop = talk.scrollHeight;
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("model").disabled = on;
}

// ---- one question and its answer

function body() {
  const messages = turns.filter((turn) => turn.content && !turn.problem).map(({ role, content }) => ({ role, content }));
  const system = $("system").value.trim();
  if (system) messages.unshift({ role: "system", content: system });
  const asked = { model: $("model").value, messages, stream: true, stream_options: { include_usage: true } };
  if ($("temperature").value !== "") asked.temperature = Number($("temperature").value);
  if ($("longest").value !== "") asked.max_tokens = Number($("longest").value);
  return JSON.stringify(asked);
}

function figures(tokens, sent, first, last, why) {
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  if (tokens > 1 && last > first) parts.push(`${((1000 * (tokens - 1)) / (last - first)).toPrecision(3)} tokens/s`);
  if (first) parts.push(`${((first - sent) / 1000).toFixed(2)} s to the first`);
  if (why) parts.push(why);
  return parts.join(" · ");
}

async function ask(question) {
  const talk = turns; // "New chat" begins another list; what is being written still belongs to this one
  talk.push({ role: "user", content: question });
  show(talk.at(-1));
  const asked = body();
  const turn = { role: "assistant", content: "", thought: "" };
  const { place, update } = show(turn);
  place.classList.add("writing");
  running = new AbortController();
  busy(true);
  scroll(true);
  keepTalk();
  const sent = performance.now();
  let first = 0, last = 0, tokens = 0, why = "";
  try {
    const response = await request("v1/chat/completions", { method: "POST", body: asked, signal: running.signal });
    if (response.status === 401) askForKey();
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice && choice.delta) {
        turn.content += choice.delta.content || "";
        turn.thought += choice.delta.reasoning_content || "";
        if (choice.delta.content || choice.delta.reasoning_content) {
          last = performance.now();
          first = first || last;
          tokens += 1;
        }
        if (choice.finish_reason === "length") why = "cut at the longest answer";
      }
      if (event.usage) tokens = event.usage.completion_tokens;
      turn.facts = figures(tokens, sent, first, last, why);
      update();
      scroll();
    }
  } catch (error) {
    if (error.name === "AbortError") {
      turn.facts = figures(tokens, sent, first, last, "stopped");
    } else {
      turn.problem = !turn.content;
      turn.facts = error.message || "the connection was lost";
    }
  }
  running = null;
  talk.push(turn);
  place.classList.remove("writing");
  update();
  busy(false);
  scroll();
  keepTalk();
  $("question").focus();
}

// ---- the controls

function grow() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight}px`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  grow();
  keepChoices();
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("question").addEventListener("input", grow);
$("stop").addEventListener("click", () => running && running.abort());
$("new").addEventListener("click", () => {
  if (running) running.abort();
  turns = [];
  keepTalk();
  document.querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("empty").hidden = false;
  $("question").focus();
});
$("settings-toggle").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("settings-toggle").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("change", keepChoices);
$("model").addEventListener("change", keepChoices);
$("door").addEventListener("close", () => {
  memory.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  connect();
});

takeKey();
restore();
connect();
