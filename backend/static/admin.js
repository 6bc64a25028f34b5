// The page asks for its status every two seconds. Small things change in place; when the status' stamp changes, the
// page is fetched again and its live sections are put in place of the old ones, so that there is one template.
"use strict";

const POLL_MS = 2000;
const OVERVIEW_POLL_MS = 5000; // it fetches the whole page
const HIDDEN_POLL_MS = 15000;
const ANSWER_MS = 20000; // a backend that hangs is one that does not answer
const root = document.body.dataset.root;
const heading = document.querySelector("[data-project]");
const byId = (id) => document.getElementById(id);

// --- small helpers ---------------------------------------------------------------------------------------------------

function setText(id, text) {
  const element = byId(id);
  if (element && element.textContent !== text) element.textContent = text;
}

function grouped(number) {
  return String(number).replace(/\B(?=(\d{3})+$)/g, "\u2009");
}

const ofProject = (path) => `/api/projects/${heading.dataset.project}${path}`;

// With the origin: nothing can be fetched relative to an address that holds user:password@. What changes something is
// waited for as long as it takes.
const ask = (path, options = {}) =>
  fetch(location.origin + path, options.method ? options : { ...options, signal: AbortSignal.timeout(ANSWER_MS) });

const readJson = (response) => response.json().catch(() => ({})); // a proxy's answer may be anything

const refusal = (response, body) => body.detail || `the backend answered HTTP ${response.status}`;

async function answer(response) {
  const body = await readJson(response);
  if (!response.ok) throw new Error(refusal(response, body));
  return body;
}

const fetchJson = async (path) => answer(await ask(root + path));

const send = (method, path, body) =>
  ask(root + path, {
    method,
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });

// A page, or a part of one.
async function fetchPage(address) {
  const response = await ask(address, { headers: { Accept: "text/html" } });
  if (!response.ok) throw new Error(refusal(response, await readJson(response)));
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  localTimes(fresh);
  return fresh;
}

function localTimes(within) {
  const today = new Date().toDateString();
  for (const element of within.querySelectorAll("time[datetime]")) {
    const at = new Date(element.dateTime);
    const clock = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    const day = at.toLocaleDateString([], { day: "numeric", month: "short" });
    element.textContent = at.toDateString() === today ? clock : `${day}, ${clock}`;
    element.title = at.toLocaleString();
  }
}

function showBanners(sentences) {
  const banners = sentences.map(([kind, text]) => {
    const banner = document.createElement("p");
    banner.className = `banner ${kind}`.trim();
    banner.textContent = text;
    return banner;
  });
  const holder = byId("banners");
  if (wordsOf(holder.children) !== wordsOf(banners)) holder.replaceChildren(...banners);
  announceBanners();
}

const wordsOf = (elements) => [...elements].map((one) => one.textContent.trim()).join(" ");
let wordsRead = wordsOf(byId("banners")?.children || []); // what the page came with is read with it

// A status region of its own: one that is replaced with its section is not read out.
function announceBanners() {
  const words = wordsOf(byId("banners")?.children || []);
  if (words !== wordsRead) setText("banners-announce", words);
  wordsRead = words;
}

// --- fetching the page again -----------------------------------------------------------------------------------------

let shown = Number(heading?.dataset.page || 0);
let asked = 0; // pages asked for
let newest = 0; // of those that came

async function refresh() {
  const turn = ++asked;
  const fresh = await fetchPage(heading ? `${location.pathname}?shown=${shown}` : location.pathname);
  if (turn < newest) return; // what was asked for later was faster
  newest = turn;
  const batchBefore = byId("batch-about")?.textContent;
  for (const section of fresh.querySelectorAll("[data-live][id]")) {
    const old = byId(section.id);
    if (old && !old.dataset.touched && differs(old, section)) exchange(old, section);
  }
  replaceTasks(fresh);
  announceBanners();
  if (byId("batch-about")?.textContent !== batchBefore) showSelection();
  window.drawCharts?.(); // curve.js: the overview has no charts
}

// Whether a section has changed. What somebody opened is no change, nor is what a button was answered: a refusal stays
// until the next button is pressed, other words as long as nothing else changes, or as long as the section waits for
// what the button asked for.
function differs(old, section) {
  keepOpen(old, section);
  const refused = old.querySelector("[data-said]")?.textContent;
  const beside = section.querySelector("[data-said]");
  if (refused && beside) beside.textContent = refused;
  const kept = [];
  for (const said of old.querySelectorAll("[role=status][id]")) {
    const place = section.querySelector(`[id="${said.id}"]`);
    if (!place || place.textContent) continue;
    place.textContent = said.textContent;
    kept.push(place);
  }
  if (equal(old, section)) return false;
  if (!section.querySelector("[data-waiting]")) for (const place of kept) place.textContent = "";
  return true;
}

// A button that is pressed is disabled until it is answered: that is not the section's doing.
function equal(old, section) {
  const pressed = [...old.querySelectorAll("button[data-act]:disabled")];
  for (const button of pressed) button.disabled = false;
  const same = old.isEqualNode(section);
  for (const button of pressed) button.disabled = true;
  return same;
}

// The keyboard stays where it was, tables stay scrolled, and what was pressed still waits for its answer.
function exchange(old, section) {
  const again = samePlace(document.activeElement, old, section);
  const scrolled = [...old.querySelectorAll(".scroll")].map((one) => [one.scrollLeft, one.scrollTop]);
  keepPressed(old, section);
  old.replaceWith(document.adoptNode(section));
  section.querySelectorAll(".scroll").forEach((one, index) => scrolled[index] && one.scrollTo(...scrolled[index]));
  again?.focus({ preventScroll: true });
}

const heirs = new WeakMap(); // a button that waits for its answer -> what stands in its place since an exchange
const heirOf = (button) => (heirs.has(button) ? heirOf(heirs.get(button)) : button);

// Or it could be pressed once more.
function keepPressed(old, section) {
  for (const button of old.querySelectorAll("button[data-act]:disabled")) {
    const heir = samePlace(button, old, section);
    if (heir?.dataset.act !== button.dataset.act) continue;
    heir.disabled = true;
    heirs.set(button, heir);
  }
}

const places = (within) => [...within.querySelectorAll("a[href], button, input, select, summary, [tabindex]")];

// What an element of `old` is in `section`: what does the same there, else what stands where it stood.
function samePlace(element, old, section) {
  const at = places(old).indexOf(element);
  if (at < 0) return null;
  const name = (one) => one.id || Object.values(one.dataset).join() || one.getAttribute("href");
  const there = places(section);
  return there.find((one) => name(one) && name(one) === name(element)) || there[Math.min(at, there.length - 1)];
}

function keepOpen(old, section) {
  const opened = old.querySelectorAll("details");
  section.querySelectorAll("details").forEach((details, index) => {
    if (opened[index]) details.open = opened[index].open;
  });
}

// Pictures that did not change stay where they are, or they would flicker.
function replaceTasks(fresh) {
  const list = byId("batch");
  if (!list) return;
  const known = new Map([...list.children].map((one) => [one.dataset.task, one]));
  let focused = list.contains(document.activeElement) ? document.activeElement : null;
  const tasks = [...fresh.querySelectorAll("#batch > li")].map((task) => {
    const old = known.get(task.dataset.task);
    if (!old) return document.adoptNode(task);
    keepOpen(old, task);
    if (old.isEqualNode(task)) return old;
    if (old.contains(focused)) focused = samePlace(focused, old, task);
    return document.adoptNode(task);
  });
  const same = tasks.length === list.children.length && tasks.every((task, index) => task === list.children[index]);
  if (same) return;
  list.replaceChildren(...tasks);
  focused?.focus({ preventScroll: true }); // also one that stays where it is loses it
}

// --- the status of one project ---------------------------------------------------------------------------------------

function showStatus(status) {
  const { now, next_round: next, counts } = status;
  showBanners([
    ...status.away.map((text) => ["bad", text]),
    ...(status.problem ? [["warn", status.problem]] : []),
    ...(status.notice ? [["", status.notice]] : []),
  ]);
  byId("now-state").className = `state ${now.kind}`;
  setText("now-words", now.words);
  setText("now-detail", now.detail);
  document.title = `${now.kind === "idle" ? "" : `${now.words} · `}${byId("title").textContent} · hardfirst`;
  setText("announce", now.words.replace(/ \d+(\/\d+)?(, .*)?$/, "")); // phases are announced, numbers are not
  byId("working").hidden = now.kind !== "working";
  if (now.fraction === null) byId("bar").removeAttribute("value");
  else byId("bar").value = now.fraction;
  setText("now-eta", now.eta ? `about ${now.eta} left` : "");
  setText("now-losses", Object.entries(now.losses).map(([name, value]) => `${name} ${value.toFixed(2)}`).join(" · "));
  showStages(now.stages);
  byId("next").hidden = !next;
  if (next) {
    setText("next-sentence", next.sentence);
    setText("next-amount", `${grouped(next.new)} / ${grouped(next.needed)} new labels`);
    byId("next-bar").value = Math.min(next.new / next.needed, 1);
  }
  for (const button of document.querySelectorAll("[data-shows]")) button.hidden = !status[button.dataset.shows];
  document.querySelector("[data-act=start]").hidden = !status.can_start;
  document.querySelector("[data-act=cancel]").hidden = !status.can_cancel;
  for (const element of document.querySelectorAll("[data-count]")) {
    const text = grouped(counts[element.dataset.count]);
    if (element.textContent !== text) element.textContent = text;
  }
}

function showStages(stages) {
  const items = stages.map((stage) => {
    const item = document.createElement("li");
    item.className = stage.state.replace(" ", "-");
    item.textContent = stage.name;
    if (stage.state === "now") item.setAttribute("aria-current", "step");
    return item;
  });
  const list = byId("stages");
  const before = [...list.children].map((item) => item.className + item.textContent).join();
  if (before !== items.map((item) => item.className + item.textContent).join()) list.replaceChildren(...items);
}

let questions = 0; // about the status
let latest = 0; // of those that were answered

async function askStatus() {
  const turn = ++questions;
  const status = await fetchJson(ofProject("/status"));
  if (turn < latest) return status; // what was asked later was answered sooner, and is shown
  latest = turn;
  showStatus(status);
  return status;
}

async function poll() {
  try {
    if (heading) {
      const status = await askStatus();
      if (status.stamp !== heading.dataset.stamp) {
        await refresh();
        heading.dataset.stamp = status.stamp;
      }
    } else if (byId("overview")) {
      await refresh();
    } else return;
  } catch (error) {
    showBanners([["bad", `The backend does not answer (${error.message}). This page goes on by itself when it is back.`]]);
  }
  setTimeout(poll, document.hidden ? HIDDEN_POLL_MS : heading ? POLL_MS : OVERVIEW_POLL_MS);
}

async function showSelection() {
  const list = byId("selection-notes");
  if (!list || !byId("batch").children.length) return;
  const selection = await fetchJson(ofProject("/selection")).catch(() => null);
  if (!selection) return list.replaceChildren(); // its manifest may be gone; what is there was another batch's
  const options = Object.entries(selection.options).map(([name, value]) => `${name} ${value}`).join(", ");
  const sentences = [`Strategy: ${selection.strategy}${options ? ` (${options})` : ""}.`, ...selection.notes];
  list.replaceChildren(...sentences.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

// --- buttons ---------------------------------------------------------------------------------------------------------

const post = async (path, body) => answer(await send("POST", ofProject(path), body));

const ACTS = {
  start: () => post("/rounds"),
  cancel: () => (confirm("Cancel this round? What is published now stays.") ? post("/rounds/cancel") : null),
  accept: () => post("/stop", { accepted: true }),
  withdraw: () => post("/stop", { accepted: false }),
  more: () => {
    const before = shown;
    shown = Math.min(shown + Number(heading.dataset.page), Number(heading.dataset.most)); // more are refused
    return refresh().catch((error) => {
      shown = before;
      throw error;
    });
  },
};

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.copy) {
    const text = byId(button.dataset.copy).textContent;
    // navigator.clipboard needs https or localhost; elsewhere the text is selected, ready for Ctrl+C
    await navigator.clipboard?.writeText(text).then(() => (button.textContent = "Copied"), () => {});
    getSelection().selectAllChildren(byId(button.dataset.copy));
  }
  if (!button?.dataset.act) return;
  const card = button.closest(".card");
  button.disabled = true;
  placeToSay(card).textContent = "";
  try {
    await ACTS[button.dataset.act](button);
    await askStatus();
    await refresh();
  } catch (error) {
    placeToSay(card).textContent = error.message;
  }
  const now = heirOf(button);
  now.disabled = false;
  keepFocus(now, present(card));
});

// A card as it is now: it may have been exchanged since its button was pressed.
const present = (card) => (card.isConnected ? card : byId(card.id));

// Beside the button, where its card has a place for it.
const placeToSay = (card) => present(card)?.querySelector("[data-said]") || byId("said");

// The keyboard's place: a button that was pressed was disabled meanwhile, and may have been replaced or be gone.
function keepFocus(button, card) {
  if (document.activeElement && document.activeElement !== document.body) return;
  const again = button.isConnected ? button : card?.querySelector(`[data-act="${button.dataset.act}"]`);
  (again && !again.hidden ? again : card?.querySelector("button:not([hidden])"))?.focus({ preventScroll: true });
}

// ---------------------------------------------------------------------------------------------------------------------

localTimes(document);
if (heading) showSelection();
setTimeout(poll, POLL_MS);
