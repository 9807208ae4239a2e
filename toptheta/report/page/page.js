"use strict";
// The report's interaction: choices, charts (drawn by Vega), sortable tables, answers side by side.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

// Light or dark: the system's choice, until the button says otherwise.
const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(name) { root.dataset.theme = name; }
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () =>
  setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
let onScreen = null;
addEventListener("beforeprint", () => { onScreen = root.dataset.theme; setTheme("light"); });
addEventListener("afterprint", () => onScreen && setTheme(onScreen));

// Tables: sorted by number; cells without a number come last.
function sortTable(table, column, header) {
  const ascending = header.getAttribute("aria-sort") === "descending";
  for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => {
    const text = row.cells[column].textContent;
    return { row, text, number: column === 0 ? NaN : parseFloat(text) };
  });
  const way = ascending ? 1 : -1;
  rows.sort((a, b) => {
    if (isNaN(a.number) && isNaN(b.number)) return way * b.text.localeCompare(a.text, undefined, { numeric: true });
    if (isNaN(a.number) || isNaN(b.number)) return isNaN(a.number) ? 1 : -1;
    return way * (a.number - b.number);
  });
  body.append(...rows.map((one) => one.row));
}
for (const table of document.querySelectorAll("table.results")) {
  [...table.tHead.rows[0].cells].forEach((header, column) =>
    header.firstElementChild.addEventListener("click", () => sortTable(table, column, header)));
}

// Charts.
function rowsOf(columns) {
  const names = Object.keys(columns);
  const read = names.map((name) => {
    const column = columns[name];
    return Array.isArray(column) ? (i) => column[i] : (i) => column.words[column.codes[i]];
  });
  const first = columns[names[0]], count = (Array.isArray(first) ? first : first.codes).length;
  return Array.from({ length: count }, (_, i) => Object.fromEntries(names.map((name, j) => [name, read[j](i)])));
}

function filled(value, values) {
  if (typeof value === "string") {
    if (value in values) return values[value];
    return value.replace(/'(@\w+)'/g, (whole, name) => (name in values ? `'${values[name]}'` : whole));
  }
  if (Array.isArray(value)) return value.map((one) => filled(one, values));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, filled(one, values)]));
}

const config = {
  background: null, view: { stroke: null }, font: "system-ui, sans-serif",
  axis: { labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal", labelColor: "#808080", titleColor: "#808080",
    gridColor: "#80808040", domainColor: "#808080", tickColor: "#808080" },
  legend: { labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelColor: "#808080", titleColor: "#808080",
    labelLimit: 260 },
};

class Chart {
  constructor(part, about) {
    Object.assign(this, about);
    this.part = part;
    this.place = document.getElementById(`${part.id}-${about.name}`);
    this.table = rowsOf(about.rows);
    this.selects = about.choices.map((choice) => {
      const select = element("select", { name: choice.name });
      choice.options.forEach((option, i) => select.append(element("option", { value: i, textContent: option.text })));
      select.addEventListener("change", () => this.part.follow(choice.name, select.selectedOptions[0].text, this));
      const label = element("label", {}, choice.name, select);
      label.hidden = choice.options.length < 2;
      this.place.querySelector(".choices").append(label);
      return select;
    });
  }

  choose(name, text) {
    const at = this.choices.findIndex((choice) => choice.name === name);
    const option = at < 0 ? -1 : this.choices[at].options.findIndex((one) => one.text === text);
    if (option < 0 || this.selects[at].value === String(option)) return false;
    this.selects[at].value = option;
    return true;
  }

  async draw() {
    const chosen = this.choices.map((choice, i) => choice.options[this.selects[i].value].values);
    const spec = filled(this.spec, Object.assign({}, ...chosen));
    const picture = this.place.querySelector(".picture");
    const size = { width: "container", autosize: { type: "fit-x", contains: "padding" } };
    const whole = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", ...size, ...spec,
      data: { values: this.table } };
    const actions = { export: true, source: false, compiled: false, editor: false };
    if (this.view) this.view.finalize();
    const embedded = await vegaEmbed(picture, whole, { renderer: "svg", actions, config, downloadFileName: this.name });
    this.view = embedded.view;
    if (this.click.length) this.view.addEventListener("click", (_, item) => item && item.datum && this.clicked(item.datum));
  }

  clicked(datum) {
    for (const name of this.click) this.part.follow(name, `${name} ${datum[name]}`, null);
  }
}

class Part {
  constructor(id, about) {
    this.id = id;
    this.charts = about.charts.map((one) => new Chart(this, one));
    this.drawn = Promise.all(this.charts.map((chart) => chart.draw()));
    if (about.samples.length) new Samples(document.getElementById(`${id}-samples`), about.samples);
  }

  // A choice made in the chart `from` is applied to all other charts that have it.
  follow(name, text, from) {
    for (const chart of this.charts) {
      if (chart === from || chart.choose(name, text)) chart.draw();
    }
  }
}

// Answers side by side.
class Samples {
  constructor(place, questions) {
    Object.assign(this, { place, questions });
    const cells = [...new Set(questions.flatMap((one) => one.answers.slice(1).map((answer) => answer.cell)))];
    this.cell = element("select", { name: "cell" }, ...cells.map((cell) => element("option", { textContent: cell })));
    this.question = element("select", { name: "question" });
    this.differing = element("input", { type: "checkbox", name: "differing" });
    const step = (by) => { this.question.selectedIndex = Math.min(Math.max(this.question.selectedIndex + by, 0),
      this.question.options.length - 1); this.show(); };
    const cellLabel = element("label", {}, "compare with", this.cell);
    cellLabel.hidden = !cells.length;
    place.querySelector(".choices").append(cellLabel, element("label", {}, "question", this.question),
      element("button", { type: "button", textContent: "previous", onclick: () => step(-1) }),
      element("button", { type: "button", textContent: "next", onclick: () => step(1) }),
      element("label", {}, this.differing, "only different answers"));
    this.cell.addEventListener("change", () => this.list());
    this.differing.addEventListener("change", () => this.list());
    this.question.addEventListener("change", () => this.show());
    this.list();
  }

  other(question) { return question.answers.slice(1).find((one) => one.cell === this.cell.value); }

  list() {
    const before = this.question.value;
    const shown = this.questions.map((one, i) => [one, i]).filter(([one]) => {
      const other = this.other(one);
      return !this.differing.checked || (other && !other.same);
    });
    this.question.replaceChildren(...shown.map(([one, i]) => element("option", { value: i, textContent: one.key })));
    if (shown.some(([, i]) => String(i) === before)) this.question.value = before;
    this.show();
  }

  show() {
    const sample = this.place.querySelector(".sample"), question = this.questions[this.question.value];
    if (!question) { sample.replaceChildren(element("p", { class: "quiet", textContent: "All answers are the same." })); return; }
    const parts = [];
    if (question.question) parts.push(element("pre", { class: "question", textContent: question.question }));
    if (typeof question.target === "string") parts.push(element("p", { class: "quiet", textContent: `Correct answer: ${question.target}` }));
    const pair = [question.answers[0], this.other(question)].filter(Boolean);
    parts.push(question.choices ? this.likelihoods(question, pair)
      : element("div", { class: "pair" }, ...pair.map((one, i) => this.reply(one, pair, i > 0))));
    sample.replaceChildren(...parts);
  }

  badges(answer, compared) {
    const badges = [];
    for (const [name, value] of Object.entries(answer.score)) {
      const binary = value === 0 || value === 1;
      const words = binary ? (value ? name : `not ${name}`) : `${name} ${value.toFixed(3)}`;
      badges.push(element("span", { class: `badge ${binary ? (value ? "right" : "wrong") : ""}`, textContent: words }));
    }
    if (answer.outcome && !answer.score.passed) badges.push(element("span", { class: "badge wrong", textContent: answer.outcome }));
    if (compared) {
      const words = answer.same ? "identical" : answer.token ? `differs from token ${answer.token} on` : "differs";
      badges.push(element("span", { class: "badge", textContent: words }));
    }
    return badges;
  }

  reply(answer, pair, compared) {
    const other = pair.length > 1 ? pair[1] : pair[0], at = other.at ?? answer.text.length;
    const text = element("pre", { class: "text" }, answer.text.slice(0, at));
    if (pair.length > 1 && !other.same) text.append(element("mark", { textContent: answer.text.slice(at) }));
    return element("div", { class: "answer" },
      element("h3", {}, answer.cell, ...this.badges(answer, compared)), text);
  }

  likelihoods(question, pair) {
    const head = element("tr", {}, element("th", { textContent: "log-probability of each choice (nats)" }),
      ...pair.map((one) => element("th", { textContent: one.cell })));
    const rows = question.choices.map((choice, i) => element("tr", {},
      element("td", {}, choice, ...(i === question.target ? [" ", element("span", { class: "badge right", textContent: "right" })] : [])),
      ...pair.map((one) => {
        const chosen = one.choice === i, verdict = i === question.target ? "right" : "wrong";
        const cell = element("td", {}, (one.logp[i] ?? null) === null ? "" : one.logp[i].toFixed(2));
        if (chosen) cell.append(" ", element("span", { class: `badge ${verdict}`, textContent: "chosen" }));
        return cell;
      })));
    return element("div", { class: "scroll" }, element("table", { class: "likelihoods" },
      element("thead", {}, head), element("tbody", {}, ...rows)));
  }
}

// The data: JSON, gzip, base64.
async function readData() {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), (one) => one.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

readData().then(async (data) => {
  const parts = Object.entries(data).map(([id, about]) => new Part(id, about));
  await Promise.all(parts.map((part) => part.drawn));
  root.dataset.drawn = "yes";
});
