// The page asks for its status every two seconds. Small things change in place; when the status' stamp changes, the
// page is fetched again and its live sections are put in place of the old ones, so that there is one template.
"use strict";

const POLL_MS = 2000;
const OVERVIEW_POLL_MS = 5000; // it fetches the whole page
const HIDDEN_POLL_MS = 15000;
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

async function fetchJson(path, options = {}) {
  const response = await fetch(root + path, options);
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.detail || `the backend answered HTTP ${response.status}`);
  return body;
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
  const same = holder.textContent.replace(/\s+/g, "") === banners.map((one) => one.textContent).join("").replace(/\s+/g, "");
  if (!same) holder.replaceChildren(...banners);
}

// --- fetching the page again -----------------------------------------------------------------------------------------

let shown = Number(heading?.dataset.page || 0);

async function refresh() {
  const address = heading ? `${location.pathname}?shown=${shown}` : location.pathname;
  const response = await fetch(address, { headers: { Accept: "text/html" } });
  if (!response.ok) return;
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  localTimes(fresh);
  const batchBefore = byId("batch-about")?.textContent;
  for (const section of fresh.querySelectorAll("[data-live][id]")) {
    const old = byId(section.id);
    if (old && !old.isEqualNode(section)) {
      keepOpen(old, section);
      old.replaceWith(document.adoptNode(section));
    }
  }
  replaceTasks(fresh);
  if (byId("batch-about")?.textContent !== batchBefore) showSelection();
  drawCharts();
}

function keepOpen(old, section) {
  const opened = old.querySelectorAll("details");
  section.querySelectorAll("details").forEach((details, index) => (details.open = Boolean(opened[index]?.open)));
}

// Pictures that did not change stay where they are, or they would flicker.
function replaceTasks(fresh) {
  const list = byId("batch");
  if (!list) return;
  const known = new Map([...list.children].map((one) => [one.dataset.task, one]));
  const tasks = [...fresh.querySelectorAll("#batch > li")].map((task) => {
    const old = known.get(task.dataset.task);
    return old && old.isEqualNode(task) ? old : document.adoptNode(task);
  });
  const same = tasks.length === list.children.length && tasks.every((task, index) => task === list.children[index]);
  if (!same) list.replaceChildren(...tasks);
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
  setText("announce", now.words.replace(/ \d+(\/\d+)?$/, "")); // phases are announced, numbers are not
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

async function poll() {
  try {
    if (heading) {
      const status = await fetchJson(`/api/projects/${heading.dataset.project}/status`);
      showStatus(status);
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
  const selection = await fetchJson(`/api/projects/${heading.dataset.project}/selection`).catch(() => null);
  if (!selection) return; // the batch itself is on the page; its manifest may be gone
  const options = Object.entries(selection.options).map(([name, value]) => `${name} ${value}`).join(", ");
  const sentences = [`Strategy: ${selection.strategy}${options ? ` (${options})` : ""}.`, ...selection.notes];
  list.replaceChildren(...sentences.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

// --- buttons ---------------------------------------------------------------------------------------------------------

const post = (path, body) =>
  fetchJson(`/api/projects/${heading.dataset.project}${path}`, {
    method: "POST",
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });

const ACTS = {
  start: () => post("/rounds"),
  cancel: () => (confirm("Cancel this round? What is published now stays.") ? post("/rounds/cancel") : null),
  accept: () => post("/stop", { accepted: true }),
  withdraw: () => post("/stop", { accepted: false }),
  more: () => {
    shown += Number(heading.dataset.page);
    return refresh();
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
  button.disabled = true;
  setText("said", "");
  try {
    await ACTS[button.dataset.act]();
    showStatus(await fetchJson(`/api/projects/${heading.dataset.project}/status`));
    await refresh();
  } catch (error) {
    setText("said", error.message);
  }
  button.disabled = false;
});

// --- charts ----------------------------------------------------------------------------------------------------------

let drawn = "";

// Plotly reads a little HTML in every text; names are to be seen as they are.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text) => (text.length > 18 ? `${text.slice(0, 17)}…` : text);
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

function drawCharts(force = false) {
  const source = byId("chart-data");
  if (!source || !window.Plotly || (!force && source.textContent === drawn)) return;
  drawn = source.textContent;
  const { curve, classes } = JSON.parse(drawn);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const axis = { gridcolor: colour("line"), zeroline: false, linecolor: colour("line"), fixedrange: true, color: colour("muted") };
  const layout = {
    font: { family: style.fontFamily, size: 13, color: colour("muted") },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    showlegend: false,
    dragmode: false,
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
  };
  const config = { displayModeBar: false, responsive: true };
  drawClasses(classes, layout, axis, colour, config);
  drawCurve(curve, layout, axis, colour, config); // after it: the cards are as high as the higher one
}

function drawCurve(curve, layout, axis, colour, config) {
  const top = Math.min(1, Math.max(0.1, ...curve.map((point) => point.map50)) * 1.22);
  const furthest = Math.max(10, ...curve.map((point) => point.labels)) * 1.08;
  const trace = {
    x: curve.map((point) => point.labels),
    y: curve.map((point) => point.map50),
    text: curve.map((point) => (curve.length > 9 ? `${point.round_number}` : `round ${point.round_number}`)),
    mode: "lines+markers+text",
    textposition: curve.map((point, index) => besideTheLine(curve, index)),
    textfont: { size: 12, color: colour("muted") },
    cliponaxis: false,
    line: { color: colour("accent"), width: 2.5 },
    marker: { size: 9, color: colour("card"), line: { color: colour("accent"), width: 2.5 } },
    customdata: curve.map((point) => point.round_number),
    hovertemplate: "round %{customdata}<br>%{x} labels<br>mAP50 %{y:.3f}<extra></extra>",
  };
  window.Plotly.react(byId("curve"), [trace], {
    ...layout,
    margin: { l: 48, r: 20, t: 12, b: 44 },
    xaxis: { ...axis, title: { text: "labels", font: { size: 13 } }, range: [0, furthest] },
    yaxis: { ...axis, title: { text: "mAP50", font: { size: 13 } }, range: [0, top], tickformat: ".2~f", nticks: 6 },
    annotations: curve.length ? [] : [emptyNote("No round has been measured yet", colour)],
  }, config);
}

// Under a curve that goes on rising, over one that goes on falling; the last point's text where the curve did not come from.
function besideTheLine(curve, index) {
  const here = curve[index].map50;
  if (index === curve.length - 1) return index && curve[index - 1].map50 > here ? "bottom center" : "top center";
  return curve[index + 1].map50 < here ? "top right" : "bottom right";
}

function drawClasses(classes, layout, axis, colour, config) {
  const measured = classes.filter((one) => one.ap50 !== null);
  const change = (one) => (one.change === null ? "" : ` <span style="color:${colour(one.change < -0.005 ? "bad" : one.change > 0.005 ? "good" : "muted")}">${signed(one.change)}</span>`);
  byId("classes").style.height = `${Math.max(300, 34 * measured.length + 60)}px`;
  const trace = {
    type: "bar",
    orientation: "h",
    x: measured.map((one) => one.ap50),
    y: measured.map((_, index) => index),
    text: measured.map((one) => `<b>${one.ap50.toFixed(2)}</b>${change(one)}`),
    textposition: "outside",
    cliponaxis: false,
    textfont: { color: colour("ink") },
    marker: { color: colour("accent"), cornerradius: 4 },
    width: 0.54,
    customdata: measured.map((one) => [plain(one.name), one.boxes]),
    hovertemplate: "%{customdata[0]}<br>AP50 %{x:.3f}<br>%{customdata[1]} boxes in the holdout<extra></extra>",
  };
  window.Plotly.react(byId("classes"), [trace], {
    ...layout,
    margin: { l: 8, r: 84, t: 6, b: 30 },
    xaxis: { ...axis, range: [0, 1], tickformat: ".1f", nticks: 6 },
    yaxis: {
      ...axis,
      autorange: "reversed",
      automargin: true,
      showgrid: false,
      ticks: "",
      tickvals: measured.map((_, index) => index),
      ticktext: measured.map((one) => `${plain(short(one.name))}  `),
      tickfont: { color: colour("ink") },
    },
    annotations: measured.length ? [] : [emptyNote("No class has been measured yet", colour)],
  }, config);
}

function emptyNote(text, colour) {
  return { text, xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, font: { color: colour("muted"), size: 14 } };
}

// ---------------------------------------------------------------------------------------------------------------------

localTimes(document);
drawCharts();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawCharts(true));
if (heading) showSelection();
setTimeout(poll, POLL_MS);
