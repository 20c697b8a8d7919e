// Heat maps: choose the panel, the measure and the scale; point at a cell or move to it by arrows.
"use strict";

const MEASURES = { effect: "effect", share: "share of the whole effect", log: "effect on the logarithm" };
const SCALES = { all: "all panels", own: "this panel", whole: "the whole effect" };
const short = (x) => String(Number(x.toPrecision(3)));
const mean = (some) => some.reduce((sum, x) => sum + x, 0) / some.length;

class Panel { // one table and its numbers
  constructor(data, element) {
    Object.assign(this, data, { element });
    this.table = element.querySelector("table");
    this.cells = [...element.querySelectorAll("tbody td")];
    this.names = [...element.querySelectorAll("tbody th")].map((head) => head.textContent);
    this.width = this.cells.length / this.names.length;
  }

  measures() {
    const known = ["effect"];
    if (this.whole > 0) known.push("share");
    if (this.logarithm && this.samples) known.push("log");
    return known;
  }

  at(i, measure) { // the effect in cell i, half its interval, and each sample's value
    if (!this.samples) {
      const by = measure === "share" ? this.whole : 1;
      const [effect, half] = [this.effects[i], this.half[i]];
      return { effect: effect === null ? NaN : effect / by, half: half === null ? NaN : half / by };
    }
    const scaled = measure === "log" ? (x) => Math.log(Math.max(x, 1e-30)) : (x) => x;
    const by = measure === "share" ? this.whole : 1;
    const values = this.samples.map((sample) => scaled(sample[i]));
    const each = values.map((x, n) => (x - scaled(this.bases[n])) / by);
    const effect = mean(each);
    const squares = each.map((x) => (x - effect) ** 2).reduce((sum, x) => sum + x, 0);
    const half = 1.96 * Math.sqrt(squares / (each.length - 1) / each.length);
    return { effect, half, values, low: mean(this.bases.map(scaled)), high: scaled(this.clean) };
  }

  bound(measure) {
    const sizes = this.cells.map((_, i) => Math.abs(this.at(i, measure).effect));
    return sizes.reduce((most, x) => (x > most ? x : most), 0) || 1;
  }

  hides({ effect, half }, bound) { // the interval contains 0, up to rounding; ROUNDING in heat.py
    return Math.abs(effect) <= Math.max(half, half >= 0 ? 1e-5 * bound : NaN);
  }

  text(x, measure) {
    return measure === "share" ? `${short(x * 100)}%` : this.wide ? x.toFixed(1) : short(x);
  }

  interval(found, measure) {
    const half = found.half;
    return `${this.text(found.effect, measure)}${half >= 0 ? ` ± ${this.text(half, measure)}` : ""}`;
  }

  paint(measure, bound) {
    const seen = { below: false };
    const own = this.bound(measure);
    this.cells.forEach((cell, i) => {
      const found = this.at(i, measure);
      const { effect } = found;
      const none = Number.isNaN(effect);
      const hatched = this.hides(found, own);
      cell.className = none ? "tlr-none" : hatched ? "tlr-zero" : effect < 0 ? "tlr-low" : "";
      const share = none || hatched ? 0 : Math.min(Math.abs(effect) / bound, 1);
      cell.style.setProperty("--s", `${Math.round(share * 100)}%`);
      seen.below ||= !hatched && effect < -0.01 * bound;
      if (!none) cell.textContent = this.wide ? this.interval(found, measure) : this.text(effect, measure);
    });
    this.element.classList.toggle("tlr-signs", seen.below);
    for (const [name, x] of [["below", -bound], ["above", bound]]) {
      this.element.querySelector(`.tlr-${name} b`).textContent = this.text(x, measure);
    }
  }

  describe(i, measure) {
    const found = this.at(i, measure);
    const [row, column] = [Math.floor(i / this.width), i % this.width];
    const place = `${this.columns[column]} ${this.joins} ${this.names[row].trim().replace(/\*$/, "")}`;
    if (Number.isNaN(found.effect)) return [`${place}: not measured`, found];
    const zero = this.hides(found, this.bound(measure)) ? "; the interval contains 0" : "";
    const samples = found.values ? `. Samples: ${found.values.map(short).join(", ")}` : "";
    const said = this.says?.[this.tops[i]];
    const top = said ? ` Top tokens, and in how many samples: ${said}.` : "";
    return [`${place}: ${this.said(found, measure)}${zero}${samples}.${top}`, found];
  }

  said(found, measure) { // what the effect does to the unit, in words
    const by = this.interval(found, measure);
    if (measure === "share") return `brings back ${by} of the lost ${this.unit}`;
    if (measure === "log") return `log ${this.unit} changes by ${by}`;
    if (this.base === null) return this.wide ? `${by} ${this.unit}` : `${by} (${this.unit})`;
    return `${this.unit} changes by ${by}, to ${short(this.base + found.effect)}`;
  }
}

class HeatMap { // the panels of one question, of which one is shown
  constructor(root, name) {
    const data = JSON.parse(root.querySelector(".tlr-data").textContent);
    const elements = root.querySelectorAll(".tlr-panel");
    this.panels = data.map((one, i) => new Panel(one, elements[i]));
    this.root = root;
    this.name = name;
    const kept = tlr.state[name] ?? {};
    this.number = this.panels[kept.panel] ? Number(kept.panel) : 0;
    this.measure = this.panel.measures().includes(kept.measure) ? kept.measure : "effect";
    this.scale = Object.hasOwn(SCALES, kept.scale ?? "") ? kept.scale : "all";
    this.cell = this.panel.cells[kept.cell] ? Number(kept.cell) : null;
    this.controls = tlr.make("div", { className: "tlr-controls" });
    this.details = tlr.make("div", { className: "tlr-details", role: "status" });
    this.strip = tlr.make("p", { className: "tlr-strip", ariaHidden: "true" });
    root.prepend(this.controls);
    root.append(this.strip, this.details);
    this.panels.forEach((panel) => this.listen(panel));
    this.show();
  }

  get panel() { return this.panels[this.number]; }

  keep() {
    const { number: panel, measure, scale, cell } = this;
    tlr.keep(this.name, { panel, measure, scale, cell });
  }

  change(what) {
    Object.assign(this, what);
    if (!this.panel.measures().includes(this.measure)) this.measure = "effect";
    if (!this.panel.cells[this.cell]) this.cell = null;
    this.keep();
    this.show();
  }

  choose(key, value) { // the panel with this value that shares most other values with the present one
    const alike = (panel) => Object.entries(panel.choice)
      .filter(([name, text]) => this.panel.choice[name] === text).length;
    const fitting = this.panels.filter((panel) => panel.choice[key] === value);
    const best = fitting.reduce((one, other) => (alike(other) > alike(one) ? other : one));
    this.change({ number: this.panels.indexOf(best) });
  }

  show() {
    this.panels.forEach((panel) => { panel.element.hidden = panel !== this.panel; });
    this.panel.paint(this.measure, this.bound());
    this.offer();
    const cells = this.panel.cells;
    const first = this.cell ?? this.strongest();
    cells.forEach((cell, i) => {
      cell.tabIndex = i === first ? 0 : -1;
      cell.ariaSelected = String(i === this.cell);
    });
    this.tell(first);
  }

  strongest() {
    const sizes = this.panel.cells.map((_, i) => {
      const found = this.panel.at(i, this.measure);
      return this.panel.hides(found, 0) || Number.isNaN(found.effect) ? -1 : found.effect;
    });
    return sizes.indexOf(sizes.reduce((most, x) => Math.max(most, x), -1));
  }

  bound() {
    const { panel, measure, scale } = this;
    if (scale === "whole" && panel.whole > 0) {
      if (measure === "log") return Math.abs(panel.at(0, "log").high - panel.at(0, "log").low) || 1;
      return measure === "share" ? 1 : panel.whole;
    }
    const alike = this.panels.filter((one) => one.metric === panel.metric);
    const known = alike.filter((one) => one.measures().includes(measure));
    return Math.max(...(scale === "own" ? [panel] : known).map((one) => one.bound(measure)));
  }

  offer() { // the lists of choices; a list with one entry is left out
    const lists = [];
    const add = (label, options, chosen, changed) => {
      if (options.length > 1) lists.push(tlr.choice(label, options, chosen, changed));
    };
    for (const key of Object.keys(this.panel.choice)) {
      const values = [...new Set(this.panels.map((panel) => panel.choice[key]))];
      const known = values.filter((value) => value !== undefined).map((value) => [value, value]);
      add(key, known, this.panel.choice[key], (value) => this.choose(key, value));
    }
    const named = (names, table) => names.map((name) => [name, table[name]]);
    add("measure", named(this.panel.measures(), MEASURES), this.measure,
      (measure) => this.change({ measure }));
    const scales = [...(this.panels.length > 1 ? ["all"] : []), "own",
      ...(this.panel.whole > 0 ? ["whole"] : [])];
    const scale = scales.includes(this.scale) ? this.scale : "own";
    add("colours up to", named(scales, SCALES), scale, (value) => this.change({ scale: value }));
    const focused = [...this.controls.querySelectorAll("select")].indexOf(document.activeElement);
    this.controls.replaceChildren(...lists);
    this.controls.querySelectorAll("select")[focused]?.focus();
  }

  listen(panel) {
    const index = (event) => panel.cells.indexOf(event.target.closest("tbody td"));
    panel.table.setAttribute("role", "grid");
    panel.table.onmouseover = (event) => { if (index(event) >= 0) this.tell(index(event)); };
    panel.table.onmouseleave = () => this.tell(this.cell ?? this.strongest());
    panel.table.addEventListener("focusin", (event) => this.tell(index(event)));
    panel.table.onclick = (event) => { if (index(event) >= 0) this.pin(index(event)); };
    panel.table.onkeydown = (event) => this.move(event, panel, index(event));
  }

  pin(i) {
    this.change({ cell: this.cell === i ? null : i });
    this.panel.cells[i].focus();
  }

  move(event, panel, i) {
    if (i < 0) return;
    if (event.key === "Enter" || event.key === " ") this.pin(i);
    const column = i % panel.width;
    const steps = {
      ArrowRight: column < panel.width - 1 ? 1 : 0, ArrowLeft: column > 0 ? -1 : 0,
      ArrowDown: panel.width, ArrowUp: -panel.width,
      Home: -column, End: panel.width - 1 - column, Enter: 0, " ": 0,
    };
    if (!Object.hasOwn(steps, event.key)) return;
    event.preventDefault();
    const next = panel.cells[i + steps[event.key]];
    if (!next || next === panel.cells[i]) return;
    panel.cells[i].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  tell(i) {
    if (i < 0) { this.details.textContent = ""; this.strip.textContent = ""; return; }
    const [text, found] = this.panel.describe(i, this.measure);
    this.details.replaceChildren(text, ...(found.values ? [noise(found)] : []));
    this.strip.replaceChildren();
    if (!this.panel.tokens) return;
    const column = i % this.panel.width;
    this.panel.names.forEach((name, row) => {
      const cell = this.panel.cells[row * this.panel.width + column];
      const word = tlr.make("span", { textContent: name.replace(/\*$/, ""), className: cell.className });
      word.style.setProperty("--s", cell.style.getPropertyValue("--s"));
      for (const end of ["--day-high", "--day-low"]) {
        word.style.setProperty(end, this.panel.element.style.getPropertyValue(end));
      }
      this.strip.append(word);
    });
  }
}

function noise({ values, low, high }) { // each sample as a dot between the corrupted and the clean run
  const all = [...values, low, high].filter(Number.isFinite);
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const place = (x) => 10 + 280 * (most > least ? (x - least) / (most - least) : 0.5);
  const draw = (tag, attributes) => {
    const part = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
    return part;
  };
  const picture = draw("svg", { width: 300, height: 34, "aria-hidden": "true" });
  for (const [x, name] of [[low, "corrupted"], [high, "clean"]]) {
    if (!Number.isFinite(x)) continue;
    const at = place(x);
    const label = draw("text", { x: at, y: 32, "text-anchor": at > 150 ? "end" : "start" });
    label.textContent = name;
    picture.append(draw("line", { x1: at, x2: at, y1: 2, y2: 20 }), label);
  }
  for (const x of values) picture.append(draw("circle", { cx: place(x), cy: 11, r: 4 }));
  return picture;
}

document.querySelectorAll(".tlr-map").forEach((root, i) => new HeatMap(root, `map${i}`));
