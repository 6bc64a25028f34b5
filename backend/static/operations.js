// The operating half of a project's page. Buttons and forms only: what they change comes back with the page's own
// refresh (admin.js), so that there is one template. Nothing here makes HTML from text.
"use strict";

const WORK_MS = 5000;

Object.assign(ACTS, {
  pause: () => post("/pause", { paused: true }),
  resume: () => post("/pause", { paused: false }),
  "retry-round": () => post("/rounds/retry"),
  "retry-purges": () => post("/purges/retry"),
  "retry-job": async (button) => answer(await send("POST", `/api/jobs/${encodeURIComponent(button.dataset.job)}/retry`)),
});

const PREVIEW_MS = 700;
const PATIENCE_MS = 15000;
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

Object.assign(ACTS, {
  suspects: async () => {
    const said = await post("/suspects");
    setText("suspects-said", said.detail); // as long as it stands there, what was found is asked for
  },
  "publish-preview": async (button) => {
    if (!confirm("Publish this batch? Annotators see it instead of today's.")) return;
    const opened = await post(`/previews/${encodeURIComponent(button.dataset.preview)}/publish`);
    delete byId("preview").dataset.touched;
    byId("previewed").replaceChildren();
    await refresh().catch(() => {}); // the form is as it was: what is said after that stays
    setText("preview-said", `Round ${opened.number} publishes it.`);
  },
});

// --- a part of the page that is fetched by itself --------------------------------------------------------------------

const fragment = (path) => fetchPage(`${root}/projects/${heading.dataset.project}${path}`);

async function showSection(id) {
  const fresh = await fragment(`/${id}`).catch(() => null); // the page's own poll says that nobody answers
  const old = byId(id);
  const section = fresh?.getElementById(id);
  if (section && !isMarkedIn(old) && differs(old, section)) exchange(old, section);
}

// A text that somebody has marked, to copy it: it would not be marked any more.
function isMarkedIn(element) {
  const marked = getSelection();
  return !marked.isCollapsed && element.contains(marked.anchorNode);
}

// A worker may look for suspects since the page was opened, since a round was published, or since a button was pressed.
const awaitsSuspects = () => document.querySelector("#suspects [data-waiting]") || byId("suspects-said")?.textContent;

async function pollSections() {
  if (!document.hidden) {
    await showSection("work");
    if (awaitsSuspects()) await showSection("suspects");
  }
  setTimeout(pollSections, WORK_MS);
}

// --- forms: what the fields say --------------------------------------------------------------------------------------

const READ = {
  switch: (text) => text === "true",
  whole: (text) => (/^[+-]?\d+$/.test(text) ? Number(text) : text), // what is no number is told by the backend
  number: (text) => (text !== "" && Number.isFinite(Number(text)) ? Number(text) : text),
  choice: (text) => text,
  text: (text) => text,
};

const readField = (field) => READ[field.dataset.kind](field.value.trim());

function readOptions(form, strategy) {
  const options = {};
  for (const set of form.querySelectorAll("[data-options-of]")) {
    if (set.dataset.optionsOf !== strategy) continue;
    for (const field of set.querySelectorAll("[data-option]")) {
      if (field.value.trim() !== field.dataset.default) options[field.dataset.option] = readField(field);
    }
  }
  return options;
}

function showOptionsOf(form, strategy) {
  for (const set of form.querySelectorAll("[data-options-of]")) set.hidden = set.dataset.optionsOf !== strategy;
}

// True: all of it is told at the fields. What a store of another version says may have none.
function showWrong(form, fields) {
  for (const note of form.querySelectorAll(".wrong")) note.hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  let first = null;
  let everyOne = Object.keys(fields).length > 0;
  for (const [name, sentence] of Object.entries(fields)) {
    const holder = form.querySelector(`[data-of="${CSS.escape(name)}"]`);
    if (!holder) {
      everyOne = false;
      continue;
    }
    const note = holder.querySelector(".wrong");
    note.textContent = sentence;
    note.hidden = false;
    for (let box = holder.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    const field = holder.querySelector("[data-field], fieldset:not([hidden]) [data-option]");
    field?.setAttribute("aria-invalid", "true");
    first ??= field;
  }
  first?.focus();
  return everyOne;
}

// --- settings --------------------------------------------------------------------------------------------------------

function changedSettings(form) {
  const values = {};
  for (const field of form.querySelectorAll("[data-field]")) {
    const text = field.value.trim();
    if (text !== field.dataset.initial) values[field.dataset.field] = text === "" ? null : readField(field);
  }
  const strategy = form.querySelector('[data-field="strategy"]').value;
  if (form.dataset.optionsTouched || "strategy" in values) values.strategy_options = readOptions(form, strategy);
  return values;
}

async function saveSettings(form) {
  const values = changedSettings(form);
  const button = form.querySelector("[type=submit]");
  showWrong(form, {});
  if (!Object.keys(values).length) return setText("settings-said", "Nothing was changed.");
  button.disabled = true;
  setText("settings-said", "Asking Label Studio, which keeps them…");
  try {
    const response = await send("PATCH", ofProject("/settings"), { values });
    const body = await readJson(response);
    if (response.ok) {
      const isTypedOn = JSON.stringify(changedSettings(form)) !== JSON.stringify(values);
      if (!isTypedOn) delete byId("settings").dataset.touched;
      await refresh().catch(() => {}); // they are saved, even if the page cannot show it yet
      setText("settings-said", "Saved. They count from the next round on.");
    } else {
      const told = showWrong(form, body.fields || {});
      setText("settings-said", told ? "Nothing was changed: see the fields marked." : refusal(response, body));
    }
  } catch (error) {
    setText("settings-said", error.message);
  }
  button.disabled = false;
}

document.addEventListener("submit", (event) => {
  if (event.target.id === "settings-form") {
    event.preventDefault();
    saveSettings(event.target);
  } else if (event.target.id === "preview-form") {
    event.preventDefault();
    byId("preview").dataset.touched = "yes"; // what is shown below the form stays when the page is refreshed
    showPreview(event.target);
  }
});

document.addEventListener("reset", (event) => {
  if (event.target.id !== "settings-form") return;
  delete byId("settings").dataset.touched; // the refresh may replace it again
  delete event.target.dataset.optionsTouched;
  showWrong(event.target, {});
  setText("settings-said", "");
  setTimeout(() => {
    showOptionsOf(event.target, event.target.querySelector('[data-field="strategy"]').value);
    refresh().catch(() => {}); // they may have been changed elsewhere since the form was touched
  });
});

document.addEventListener("input", (event) => {
  const form = event.target.form;
  if (!form) return;
  if (form.id === "settings-form") byId("settings").dataset.touched = "yes";
  if (form.id === "preview-form") byId("preview").dataset.touched = "yes";
  if (event.target.dataset.option) form.dataset.optionsTouched = "yes";
  if (event.target.dataset.field === "strategy") showOptionsOf(form, event.target.value);
});

// --- a batch under other settings ------------------------------------------------------------------------------------

async function showPreview(form) {
  const button = form.querySelector("[type=submit]");
  const strategy = form.querySelector('[data-field="strategy"]').value;
  const body = { strategy_options: readOptions(form, strategy) };
  for (const field of form.querySelectorAll("[data-field]")) {
    if (field.value.trim() !== "") body[field.dataset.field] = readField(field);
  }
  button.disabled = true;
  showWrong(form, {});
  setText("preview-said", "A worker chooses the batch…");
  try {
    const response = await send("POST", ofProject("/previews"), body);
    const made = await readJson(response);
    if (!response.ok) {
      const told = showWrong(form, made.fields || {});
      setText("preview-said", told ? "See the fields marked." : refusal(response, made));
    } else {
      await awaitPreview(made.id);
    }
  } catch (error) {
    setText("preview-said", error.message);
  }
  button.disabled = false;
}

async function awaitPreview(id) {
  const began = Date.now();
  for (;;) {
    if (Date.now() - began > PATIENCE_MS) setText("preview-said", "Still at it, or waiting for a worker: see Workers and queues.");
    const fresh = await fragment(`/previews/${id}`);
    const found = fresh.getElementById("previewed");
    if (found.dataset.state !== "waiting") {
      byId("previewed").replaceWith(document.adoptNode(found));
      setText("preview-said", found.dataset.state === "ready" ? "Ready: see below." : "");
      return;
    }
    await sleep(PREVIEW_MS);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

setTimeout(pollSections, WORK_MS);
