"use strict";
{
// Filters act on all panes and stand in the address, so that a view can be sent to a colleague.

const page = JSON.parse(document.getElementById("content").textContent);
const $ = (id) => document.getElementById(id);
const tables = Object.fromEntries(
  ["cells", "curves", "ranking", "memory", "clients", "target", "runs"].map((name) => [name, unpack(page[name])]),
);
const order = new Map(page.methods.map((method, place) => [method.method, place]));
const all = { task: "all tasks", partition: "all partitions" };
const first = {
  task: "", partition: "", hide: [], x: "upload_bytes", y: "score", along: "round",
  share: "0.97", spent: "upload_bytes", cell: "",
};
let state = { ...first };
const views = {};

function unpack(columns) {
  const names = Object.keys(columns);
  const length = names.length ? columns[names[0]].length : 0;
  return Array.from({ length }, (_, row) => Object.fromEntries(names.map((name) => [name, columns[name][row]])));
}

// Which rows the filters leave.

const shown = (row) =>
  (!state.task || row.task === state.task) &&
  (!state.partition || row.partition === state.partition) &&
  !state.hide.includes(row.method);

function mean(rows, column) {
  const known = rows.map((row) => row[column]).filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function groups(rows, key) {
  const found = new Map();
  for (const row of rows) {
    const name = key(row);
    if (!found.has(name)) found.set(name, []);
    found.get(name).push(row);
  }
  return [...found.values()];
}

function ranking() {
  const costs = page.axes.map((axis) => axis[0]).filter((name) => name !== "score");
  return tables.ranking
    .filter((row) => row.task === state.task && row.partition === state.partition && !state.hide.includes(row.method))
    .map((row) => {
      const cells = tables.cells.filter((cell) => shown(cell) && cell.method === row.method);
      return { ...row, ...Object.fromEntries(costs.map((name) => [name, mean(cells, name)])) };
    });
}

function memory() {
  return groups(tables.memory.filter(shown), (row) => JSON.stringify([row.task, row.method, row.kind])).map((rows) => ({
    ...rows[0], bytes: mean(rows, "bytes"), place: order.get(rows[0].method),
  }));
}

function target() {
  return tables.target
    .filter((row) => shown(row) && String(row.target) === state.share)
    .map((row) => ({ ...row, amount: row[state.spent], place: order.get(row.method) }));
}

// How a pane is drawn.

const where = () => `${state.task || all.task}, ${state.partition || all.partition}`;
const axis = (axes, name) => axes.find((one) => one[0] === name) || axes[0];

// Panels in the study's order, as many beside each other as there is room for.
function arrange(chart, rows, by, room, least, margin) {
  const order = [...new Set(rows.map((row) => row[by]))];
  const count = order.length;
  chart.facet.sort = order;
  const most = Math.max(1, Math.min(count, Math.floor(room / least)));
  const columns = Math.ceil(count / Math.ceil(count / most)); // no last row that is nearly empty
  chart.columns = columns;
  chart.spec.width = Math.max(140, Math.floor(room / columns) - margin);
}

function scale(encoding, [field, title, logarithmic], zero) {
  encoding.field = field;
  encoding.title = title;
  if (field === "round") encoding.axis = { tickMinStep: 1 };
  else if (field !== "score") encoding.axis = { ...encoding.axis, format: "~s" };
  encoding.scale = logarithmic ? { type: "log", nice: false, padding: 10 } : { zero };
}

const layers = (chart) => chart.spec.layer || [chart.spec];

const panes = {
  ranking(chart, room) {
    const rows = ranking();
    const narrow = room < 1000;
    if (narrow) {
      chart = structuredClone(page.charts.ranking_narrow);
      for (const part of chart.vconcat) part.width = Math.max(120, room - 190);
    }
    return { chart, rows, note: rows.length ? rows[0].measure : "" };
  },
  trade_off(chart, room) {
    const [x, y] = [axis(page.axes, state.x), axis(page.axes, state.y)];
    const drawn = (row) => shown(row) && [x, y].every(([name, , log]) => row[name] !== null && (!log || row[name] > 0));
    const rows = tables.cells.filter(drawn);
    for (const layer of layers(chart)) {
      scale(layer.encoding.x, x, false);
      const isScore = y[0] === "score";
      if (layer.encoding.y2) {
        // The deviation is known of the score only.
        scale(layer.encoding.y, isScore ? ["low", y[1], y[2]] : y, false);
        layer.encoding.y2.field = isScore ? "high" : y[0];
        if (isScore) delete layer.encoding.y.axis;
      } else scale(layer.encoding.y, y, false);
      layer.encoding.y.scale.padding = 10; // a marker at the edge is drawn whole
    }
    arrange(chart, rows, "cell", room, 300, 95);
    return { chart, rows };
  },
  curves(chart, room) {
    const x = axis(page.along, state.along);
    const rows = tables.curves.filter((row) => shown(row) && row[x[0]] !== null && (!x[2] || row[x[0]] > 0));
    for (const layer of layers(chart)) scale(layer.encoding.x, x, false);
    arrange(chart, rows, "cell", room, 300, 95);
    return { chart, rows };
  },
  target(chart, room) {
    const rows = target();
    const x = axis([...page.along, ["peak_memory_bytes", "peak memory of a turn (bytes)", true]], state.spent);
    const least = Math.min(...rows.map((row) => row.amount).filter((amount) => amount !== null));
    for (const layer of layers(chart)) if (layer.encoding.x.field) scale(layer.encoding.x, ["amount", x[1], x[2] && least > 0], false);
    arrange(chart, rows, "cell", room, 400, 190);
    return { chart, rows };
  },
  memory(chart, room) {
    const rows = memory();
    arrange(chart, rows, "task", room, 460, 190);
    return { chart, rows };
  },
  partitions(chart, room) {
    const rows = tables.clients.filter((row) => shown({ ...row, method: null }));
    arrange(chart, rows, "cell", room, 300, 95);
    return { chart, rows };
  },
};

const names = {
  ranking: "ranking", trade_off: "cells", curves: "curves", target: "target", memory: "memory", partitions: "partitions",
};

async function draw(name) {
  const section = $(name);
  const place = section.querySelector(".chart");
  const room = Math.max(260, section.clientWidth - 4);
  const { chart, rows, note } = panes[name](structuredClone(page.charts[name]), room);
  if (views[name]) views[name].finalize();
  delete views[name];
  section.dataset.rows = rows.length;
  if (!rows.length) {
    place.innerHTML = "<p class='empty'>Nothing to show with these filters.</p>";
    return;
  }
  const title = section.querySelector("h2").textContent;
  const made = {
    ...chart,
    title: { text: title, subtitle: note ? [where(), note] : where(), anchor: "start", fontSize: 13, offset: 8 },
    datasets: { [names[name]]: rows },
    config: {
      font: "system-ui, sans-serif", background: "white", view: { stroke: "#bbb" },
      axis: { gridColor: "#e8e8e8", titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12 },
      legend: { labelFontSize: 12, columns: Math.max(1, Math.floor(room / 190)) },
    },
  };
  const result = await vegaEmbed(place, made, { actions: false, renderer: "svg", defaultStyle: false });
  views[name] = result.view;
  place.querySelector("svg").setAttribute("role", "img");
  place.querySelector("svg").setAttribute("aria-label", `${title}: ${where()}`);
  if (name === "trade_off")
    result.view.addEventListener("click", (event, item) => {
      const datum = item && item.datum;
      if (datum && datum.method && datum.partition) {
        change({ cell: JSON.stringify([datum.task, datum.partition, datum.method]) });
        $("provenance").scrollIntoView({ behavior: "smooth" });
      }
    });
}

// Text beside the panes.

function element(tag, text, kind) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function fill(table, headings, rows) {
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  for (const heading of headings) head.append(element("th", heading));
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const value of row) {
      const number = typeof value === "number";
      const cell = element("td", "", number ? "number" : "");
      cell.append(value instanceof Node ? value : String(value ?? "–"));
      line.append(cell);
    }
  }
}

function si(value) {
  if (value === null || value === undefined) return "–";
  const power = value ? Math.min(5, Math.max(0, Math.floor(Math.log10(Math.abs(value)) / 3))) : 0;
  return `${Number((value / 1000 ** power).toPrecision(3))}${["", "k", "M", "G", "T", "P"][power]}`;
}
const point = (value) => (value === null || value === undefined ? "–" : value.toFixed(1));

function numbers() {
  const costs = page.axes.filter(([name]) => name !== "score");
  fill(
    $("numbers"),
    ["Method", "Score", "95% interval", "Group", "Cells", ...costs.map((one) => one[1])],
    ranking().map((row) => [
      row.title, point(row.value), row.low === null ? "–" : `${point(row.low)} to ${point(row.high)}`, row.group || "–",
      `${row.cells} of ${row.cells_of_all}`, ...costs.map(([name]) => si(row[name])),
    ]),
  );
}

function provenance() {
  const [task, partition, method] = state.cell ? JSON.parse(state.cell) : [];
  const rows = tables.runs.filter((run) => run.task === task && run.partition === partition && run.method === method);
  $("runs").hidden = !rows.length;
  fill(
    $("runs"),
    ["Seed", "Test score", "Made by commit", "Final payload", "To make it again"],
    rows.map((run) => [
      run.seed, `${run.metric} ${run.test_score}`, run.commit + (run.dirty ? ", with changes" : ""), run.payload,
      element("code", `python -m fedlm rerun ${run.record}`),
    ]),
  );
}

// The state and its controls.

function options(select, choices) {
  select.replaceChildren(
    ...choices.map(([value, text]) => {
      const made = element("option", text);
      made.value = value;
      return made;
    }),
  );
}

function glyph(method) {
  const made = document.createElement("span");
  made.innerHTML = '<svg width="16" height="16" viewBox="-1.5 -1.5 3 3" aria-hidden="true"><path></path></svg>';
  const path = made.querySelector("path");
  path.setAttribute("d", method.shape);
  path.setAttribute("fill", method.colour);
  return made;
}

function build() {
  $("summary").textContent =
    `${tables.runs.length} runs of ${page.methods.length} methods on ${page.tasks.length} ` +
    `${page.tasks.length === 1 ? "task" : "tasks"}`;
  options($("task"), [["", all.task], ...page.tasks.map((name) => [name, name])]);
  options($("partition"), [["", all.partition], ...page.partitions.map((name) => [name, name])]);
  for (const id of ["x", "y"]) options($(id), page.axes.map(([name, title]) => [name, title]));
  options($("along"), page.along.map(([name, title]) => [name, title]));
  options($("spent"), [...page.along, ["peak_memory_bytes", "peak memory of a turn (bytes)"]].map(([name, title]) => [name, title]));
  options($("share"), [...new Set(tables.target.map((row) => row.target))].map((share) => [String(share), `${share * 100}%`]));
  options($("cell"), [
    ["", "choose, or click on a point of the trade-off"],
    ...tables.cells.map((row) => [JSON.stringify([row.task, row.partition, row.method]), `${row.title} on ${row.task}, ${row.partition}`]),
  ]);
  for (const method of page.methods) {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.value = method.method;
    box.addEventListener("change", () =>
      change({ hide: page.methods.map((one) => one.method).filter((one) => !boxes().find((b) => b.value === one).checked) }),
    );
    label.append(box, glyph(method), method.title + (method.control ? " (control)" : ""));
    $("methods").append(label);
  }
  for (const id of ["task", "partition", "x", "y", "along", "share", "spent", "cell"])
    $(id).addEventListener("change", () => change({ [id]: $(id).value }));
  $("reset").addEventListener("click", () => change({ ...first }));
  for (const note of page.notes) $("notes").append(element("li", note));
  $("target").hidden = !tables.target.length;
  for (const name of Object.keys(panes)) {
    const save = element("span", "", "save");
    for (const kind of ["svg", "png"]) {
      const button = element("button", `Save as ${kind}`);
      button.type = "button";
      button.addEventListener("click", () => keep(name, kind));
      save.append(button);
    }
    $(name).querySelector(".tools").append(save);
  }
}

const boxes = () => [...$("methods").querySelectorAll("input")];

async function keep(name, kind) {
  if (!views[name]) return;
  const link = document.createElement("a");
  link.href = await views[name].toImageURL(kind, kind === "png" ? 3 : 1);
  link.download = `${[page.study, name, state.task, state.partition].filter(Boolean).join("_")}.${kind}`;
  link.click();
}

function write() {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(state))
    if (String(value) !== String(first[name])) parameters.set(name, name === "hide" ? JSON.stringify(value) : value);
  const address = parameters.toString();
  history.replaceState(null, "", address ? `#${address}` : location.pathname + location.search);
}

function read() {
  const found = { ...first };
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (name in first) found[name] = value;
  const known = (value, choices) => choices.includes(value);
  try {
    found.hide = Array.isArray(found.hide) ? found.hide : JSON.parse(found.hide);
    if (found.cell && JSON.parse(found.cell).length !== 3) found.cell = "";
  } catch {
    found.hide = [];
    found.cell = "";
  }
  // An address from another study may name what this one has not.
  for (const id of ["task", "partition", "x", "y", "along", "share", "spent"])
    if (!known(found[id], [...$(id).options].map((option) => option.value))) found[id] = first[id];
  return found;
}

function refresh() {
  for (const id of ["task", "partition", "x", "y", "along", "share", "spent", "cell"]) $(id).value = state[id];
  for (const box of boxes()) box.checked = !state.hide.includes(box.value);
  numbers();
  provenance();
  return Promise.all(Object.keys(panes).filter((name) => !$(name).hidden).map(draw));
}

function change(values) {
  const drawn = Object.keys(values).some((name) => name !== "cell");
  state = { ...state, ...values };
  write();
  document.body.dataset.ready = "no";
  const done = () => (document.body.dataset.ready = "yes");
  if (drawn) return refresh().then(done);
  $("cell").value = state.cell;
  provenance();
  done();
}

build();
state = read();
refresh().then(() => (document.body.dataset.ready = "yes"));
window.addEventListener("hashchange", () => {
  state = read();
  refresh();
});
let waiting;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(refresh, 200);
});
}
