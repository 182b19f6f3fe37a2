// The page talks to the service that served it, and to nothing else.
"use strict";

const STAGES = ["queue", "encode", "context", "predict", "snap", "decode"];
const SAMPLE = `The steam engine was first used to pump water out of mines.
Thomas Newcomen built one in 1712 at a colliery near Dudley.
James Watt saw that most of its heat was wasted in the cylinder.
In 1769 he patented a separate condenser that stayed cold.
With Matthew Boulton he then sold engines to mills and mines.`;

const $ = (id) => document.getElementById(id);
let running = null;
let corpusChunks = 0;
let contexts = new Map(); // chunks that each model reads, by name

function headers() {
  const key = $("key").value.trim();
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

async function messageOf(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the service answered ${reply.status}`;
  }
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function showHealth() {
  const place = $("health");
  try {
    const health = await (await fetch("health")).json();
    place.className = health.status.split(" ")[0];
    const why = health.reasons.length ? `: ${health.reasons.join("; ")}` : "";
    place.textContent = `The service is ${health.status}${why}.`;
  } catch {
    place.className = "not";
    place.textContent = "The service does not answer.";
  }
}

async function showModels() {
  const reply = await fetch("v1/models", { headers: headers() });
  if (reply.status === 401) {
    $("key-row").hidden = false;
    $("notice").textContent = "This service asks for an API key.";
    return;
  }
  if (!reply.ok) {
    $("notice").textContent = await messageOf(reply);
    return;
  }
  const known = await reply.json();
  $("notice").textContent = "";
  const chosen = new Set(checkedModels());
  $("models").replaceChildren(
    ...known.models.map((model) => {
      const box = element("input");
      box.type = "checkbox";
      box.name = "model";
      box.value = model.name;
      box.checked = chosen.size ? chosen.has(model.name) : model.name === known.default_model;
      const label = element("label");
      label.title = model.folder;
      label.append(box, model.name);
      return label;
    }),
  );
  contexts = new Map(known.models.map((model) => [model.name, model.context]));
  corpusChunks = known.corpus.chunks ?? 0;
  $("length").max = known.limits.max_rollout;
  $("smooth-row").hidden = !known.smoothing;
  $("codec").textContent =
    `codec ${known.codec.name} (${known.codec.digest}), ${known.codec.max_tokens} tokens per chunk, ` +
    (hasCorpus() ? `${corpusChunks.toLocaleString("en")} corpus chunks` : "no corpus");
  $("snap-row").hidden = !hasCorpus();
  $("fill").options[0].hidden = !hasCorpus();
  if (!hasCorpus() && $("fill").value === "retrieve") $("fill").value = "repeat";
}

const hasCorpus = () => corpusChunks > 0;

const checkedModels = () =>
  [...document.querySelectorAll('input[name="model"]:checked')].map((box) => box.value);

function input() {
  const text = $("text").value.trim();
  if (!$("lines").checked) return { text };
  return { chunks: text.split("\n").map((line) => line.trim()).filter(Boolean) };
}

// Server-sent events of a POST, which EventSource cannot send.
async function* eventsOf(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    for (let end; (end = waiting.indexOf("\n\n")) >= 0; waiting = waiting.slice(end + 2)) {
      const block = waiting.slice(0, end);
      const name = /^event: (.*)$/m.exec(block)?.[1];
      const data = /^data: (.*)$/m.exec(block)?.[1];
      if (name && data) yield { name, data: JSON.parse(data) };
    }
  }
}

function showChunks(chunks) {
  const longest = Math.max(...checkedModels().map((name) => contexts.get(name) ?? chunks.length));
  $("chunks-section").hidden = false;
  $("chunks").replaceChildren(
    ...chunks.map((text, i) => {
      const read = i >= chunks.length - longest;
      const item = element("li", text, read ? "" : "unread");
      if (!read) item.title = `Not read: ${longest === 1 ? "the last chunk is" : `the last ${longest} chunks are`}.`;
      return item;
    }),
  );
}

const SOURCES = {
  exact: ["read back", "The vector is this text's own: the decoder reads it back."],
  writer: ["written", "No text has this vector. A language model wrote the text from it."],
  corpus: ["found in the corpus", "No acceptable text was written: this is the nearest corpus chunk."],
};

function pathOf(step) {
  const path = element("p", undefined, "path");
  for (const attempt of step.attempts) {
    path.append(`${SOURCES[attempt.source][0]}, refused (${attempt.refusals.join(", ")}): `);
    path.append(element("s", attempt.text || "nothing"), " → ");
  }
  path.append(SOURCES[step.source][1]);
  if (step.refusals.length) path.append(` Refused, but no better text was found: ${step.refusals.join(", ")}.`);
  if (step.emergency) path.append(` The decoder was bypassed: ${step.emergency}.`);
  return path;
}

function stepOf(step) {
  const made = $("step").content.cloneNode(true);
  const words = made.querySelector(".words");
  words.textContent = step.text;
  words.append(element("span", SOURCES[step.source][0], `badge ${step.source}`));
  if (step.cached) words.append(element("span", `cached ${step.cached}`, "badge"));
  if (step.smoothed_from) words.append(element("span", "smoothed", "badge"));
  made.querySelector(".path").replaceWith(pathOf(step));

  const ms = step.milliseconds;
  const bar = made.querySelector(".bar");
  const sum = STAGES.reduce((total, stage) => total + ms[stage], 0) || 1;
  for (const stage of STAGES) {
    if (!ms[stage]) continue;
    const part = element("i");
    part.style.setProperty("--c", `var(--${stage})`);
    part.style.width = `${(100 * ms[stage]) / sum}%`;
    part.title = `${stage} ${ms[stage].toFixed(1)} ms`;
    bar.append(part);
  }
  bar.setAttribute("aria-label", STAGES.map((s) => `${s} ${ms[s].toFixed(1)} milliseconds`).join(", "));
  made.querySelector(".figures").textContent =
    `${ms.total.toFixed(ms.total < 10 ? 1 : 0)} ms · cosine to the prediction ${step.cosine.toFixed(3)} · ` +
    `prediction to snap ${step.snapped_cosine.toFixed(3)} · context ${step.context.mode}`;

  made.querySelector(".context ol").append(
    ...step.context.texts.map((text, i) => {
      const origin = step.context.origins[i];
      const item = element("li", text);
      if (origin !== "text") item.append(element("span", origin, "badge"));
      return item;
    }),
  );
  made.querySelector(".near").hidden = !step.neighbours.length;
  made.querySelector(".near ol").append(
    ...step.neighbours.map((near) => {
      const item = element("li", near.text);
      item.append(element("span", `${near.cosine.toFixed(3)} · ${near.title}`, "badge"));
      return item;
    }),
  );
  return made;
}

async function ask(model, body, signal) {
  const made = $("column").content.cloneNode(true);
  const column = made.querySelector(".column");
  column.querySelector("h3").textContent = model;
  column.querySelector(".about").textContent = "waiting…";
  $("columns").append(made);
  const steps = column.querySelector(".steps");
  const said = [];
  let chunks = [];
  try {
    const reply = await fetch("v1/generate", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ ...body, model, stream: true }),
      signal,
    });
    if (!reply.ok) throw new Error(await messageOf(reply));
    for await (const { name, data } of eventsOf(reply)) {
      if (name === "start") {
        chunks = data.inputs[0].chunks;
        showChunks(chunks);
        const p = data.model.parameters;
        column.querySelector(".about").textContent =
          `${data.model.folder} · ${p ? `${(p / 1e6).toFixed(1)} M parameters` : "no prediction: reads the last chunk back"}`;
      } else if (name === "chunk") {
        said.push(data.text);
        steps.append(stepOf(data));
      } else if (name === "error") {
        throw new Error(data.error.message);
      }
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    steps.append(element("p", stopped ? "stopped" : error.message, stopped ? "about" : "error"));
  }
  if (said.length) {
    const next = column.querySelector(".continue");
    next.hidden = false;
    next.addEventListener("click", () => {
      $("lines").checked = true;
      $("text").value = [...chunks, ...said].join("\n");
      $("form").requestSubmit();
    });
  }
}

async function submit(event) {
  event.preventDefault();
  running?.abort();
  const models = checkedModels();
  const given = input();
  const notice = $("notice");
  notice.textContent = "";
  if (!(given.text || given.chunks?.length)) {
    notice.textContent = "Type or paste a text first.";
    $("text").focus();
    return;
  }
  if (!models.length) {
    notice.textContent = "Pick at least one model.";
    return;
  }
  const mine = (running = new AbortController());
  $("stop").hidden = false;
  $("answers").hidden = false;
  $("columns").replaceChildren();
  const body = {
    ...given,
    length: Number($("length").value) || 1,
    fill: $("fill").value,
    snap: hasCorpus() && $("snap").checked,
    cache: $("cache").checked,
    smooth: $("smooth").checked,
    neighbours: hasCorpus() ? 5 : 0,
  };
  await Promise.all(models.map((model) => ask(model, body, mine.signal)));
  if (running === mine) {
    running = null;
    $("stop").hidden = true;
    showHealth();
  }
}

$("legend").append(
  ...STAGES.map((stage) => {
    const item = element("li", stage);
    item.style.setProperty("--c", `var(--${stage})`);
    return item;
  }),
);
$("form").addEventListener("submit", submit);
$("stop").addEventListener("click", () => running?.abort());
$("sample").addEventListener("click", () => {
  $("text").value = SAMPLE;
  $("lines").checked = true;
  $("text").focus();
});
$("key").value = sessionStorage.getItem("latent-key") || "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("latent-key", $("key").value.trim());
  showModels();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("form").requestSubmit();
  } else if (event.key === "Escape") {
    running?.abort();
  }
});
showHealth();
showModels();
