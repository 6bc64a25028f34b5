// The measuring half of a project's page: its chart and its buttons. admin.js fetches the page again and calls
// drawCharts; nothing here makes HTML from text.
"use strict";

Object.assign(ACTS, {
  "ask-holdout": (button) => post("/holdout", { images: Number(button.dataset.images) }),
  "withdraw-holdout": () => post("/holdout", { images: 0 }),
  acknowledge: (button) => post("/warnings", { warning: button.dataset.warning }),
});

let drawn = "";

function drawCharts(force = false) {
  const source = byId("chart-data");
  if (!source || !window.Plotly || (!force && source.textContent === drawn)) return;
  drawn = source.textContent;
  const { curve } = JSON.parse(drawn);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  window.Plotly.react(byId("curve"), curveTraces(curve, colour), curveLayout(curve, style.fontFamily, colour), {
    displayModeBar: false,
    responsive: true,
  });
}

// Back to front. A trace is there only when a round has stored what it shows.
function curveTraces(curve, colour) {
  const traces = [];
  if (curve.band.length) traces.push(bandTrace(curve.band, colour));
  if (curve.line.length) traces.push(fitTrace(curve.line, colour));
  traces.push(measuredTrace(curve.points, colour));
  if (curve.next) traces.push(nextTrace(curve.next, colour));
  return traces;
}

function bandTrace(band, colour) {
  const back = [...band].reverse();
  return {
    x: [...band.map(([x]) => x), ...back.map(([x]) => x)],
    y: [...band.map(([, , high]) => high), ...back.map(([, low]) => low)],
    mode: "lines",
    line: { width: 0 },
    fill: "toself",
    fillcolor: faint(colour("accent"), 0.12),
    hoverinfo: "skip",
  };
}

function fitTrace(line, colour) {
  return {
    x: line.map(([x]) => x),
    y: line.map(([, y]) => y),
    mode: "lines",
    line: { width: 1.8, dash: "5px,4px", color: colour("muted") },
    hoverinfo: "skip",
  };
}

function measuredTrace(points, colour) {
  const between = points.map((point) => (point.low === null ? "" : `<br>${point.low.toFixed(3)} to ${point.high.toFixed(3)}`));
  return {
    x: points.map((point) => point.labels),
    y: points.map((point) => point.map50),
    error_y: errorBars(points.map((point) => [point.map50, point.low, point.high]), colour("accent")),
    text: points.map((point, index) => pointWords(point, index, points)),
    mode: "lines+markers+text",
    textposition: points.map((_, index) => besideTheLine(points, index)),
    textfont: { size: 12, color: colour("muted") },
    cliponaxis: false,
    line: { color: colour("accent"), width: 2.5 },
    marker: { size: 8, color: colour("card"), line: { color: colour("accent"), width: 2.5 } },
    customdata: points.map((point, index) => [point.round_number, between[index]]),
    hovertemplate: "<b>round %{customdata[0]}</b><br>%{x} labels<br>mAP50 %{y:.3f}%{customdata[1]}<extra></extra>",
  };
}

function nextTrace(next, colour) {
  const gain = `${signedGain(next.gain)} (${signedGain(next.gain_low)} to ${signedGain(next.gain_high)})`;
  return {
    x: [next.labels],
    y: [next.map50],
    error_y: errorBars([[next.map50, next.low, next.high]], colour("muted")),
    mode: "markers",
    cliponaxis: false,
    marker: { size: 10, symbol: "diamond", color: colour("card"), line: { color: colour("muted"), width: 2.2 } },
    customdata: [[`${next.low.toFixed(3)} to ${next.high.toFixed(3)}`, gain]],
    hovertemplate:
      "<b>next round, as the fit has it</b><br>%{x} labels<br>mAP50 %{y:.3f}, %{customdata[0]}<br>gain %{customdata[1]}<extra></extra>",
  };
}

function errorBars(rows, color) {
  const reach = (from, to) => (to === null ? 0 : Math.max(0, to - from));
  return {
    type: "data",
    symmetric: false,
    array: rows.map(([middle, , high]) => reach(middle, high)),
    arrayminus: rows.map(([middle, low]) => (low === null ? 0 : reach(low, middle))),
    visible: rows.some(([, low]) => low !== null),
    color: faint(color, 0.55),
    thickness: 1.4,
    width: 3,
  };
}

function curveLayout(curve, family, colour) {
  const highs = curve.points.map((point) => point.high ?? point.map50);
  const top = Math.min(1, Math.max(0.1, ...highs, curve.next ? curve.next.high : 0) * 1.12);
  const furthest = Math.max(10, ...curve.points.map((point) => point.labels), curve.next ? curve.next.labels : 0) * 1.06;
  const visible = curve.points.length > 0; // a scale of nothing says nothing
  const axis = { visible, gridcolor: colour("line"), zeroline: false, linecolor: colour("line"), fixedrange: true, color: colour("muted") };
  return {
    font: { family, size: 13, color: colour("muted") },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    showlegend: false,
    dragmode: false,
    hovermode: "closest",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" },
    margin: { l: 48, r: 20, t: 18, b: 44 },
    xaxis: { ...axis, title: { text: "labels", font: { size: 13 } }, range: [0, furthest], nticks: 7 },
    yaxis: { ...axis, title: { text: "mAP50", font: { size: 13 } }, range: [0, top], tickformat: ".2~f", nticks: 6 },
    shapes: curve.knee === null ? [] : [kneeLine(curve.knee, colour)],
    annotations: curveNotes(curve, colour),
  };
}

function kneeLine(knee, colour) {
  return { type: "line", x0: knee, x1: knee, yref: "paper", y0: 0, y1: 1, layer: "below", line: { color: colour("warn"), width: 1.4, dash: "dot" } };
}

function curveNotes(curve, colour) {
  if (!curve.points.length) {
    const font = { color: colour("muted"), size: 14 };
    return [{ text: "No round has been measured yet", xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, font }];
  }
  const font = { color: colour("warn"), size: 12 };
  return curve.knee === null
    ? []
    : [{ text: "knee", x: curve.knee, yref: "paper", y: 0, xanchor: "left", yanchor: "bottom", xshift: 3, showarrow: false, font }];
}

// All of few points; of many, or on a phone, the first and the last: the others say it when pointed at.
function pointWords(point, index, points) {
  const many = points.length > 6 || byId("curve").clientWidth < 480;
  return many && index && index !== points.length - 1 ? "" : `round ${point.round_number}`;
}

// Under a curve that goes on rising, over one that goes on falling: where neither it nor an interval is.
function besideTheLine(points, index) {
  if (index === points.length - 1) return index && points[index - 1].map50 > points[index].map50 ? "bottom left" : "top left";
  return points[index + 1].map50 < points[index].map50 ? "top right" : "bottom right";
}

const signedGain = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

// #rrggbb with an opacity.
function faint(hex, opacity) {
  const [red, green, blue] = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, ${opacity})`;
}

drawCharts();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawCharts(true));
