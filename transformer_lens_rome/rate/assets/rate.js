// A rating page: one item at a time, answers that stay through a reload, and an exported file.
"use strict";

(() => {
  const page = JSON.parse(document.getElementById("content").textContent);
  const names = Object.keys(page.questions);
  const options = [...page.letters].map((letter) => [letter, `Text ${letter}`, letter.toLowerCase()]);
  options.push([page.same, page.same, "n"]);
  const place = `transformer_lens_rome ${page.page}`;
  let kept = true; // whether the browser keeps the answers
  let state = read() ?? begin();

  function begin() {
    const digits = [...crypto.getRandomValues(new Uint8Array(8))];
    const none = names.map((name) => [name, page.items.map(() => null)]);
    return {
      rater: digits.map((digit) => digit.toString(16).padStart(2, "0")).join(""),
      kind: navigator.webdriver ? "simulated" : "person", // a program drives the browser, or nobody
      at: 0,
      answers: Object.fromEntries(none),
    };
  }

  function read() {
    try {
      const found = JSON.parse(localStorage.getItem(place));
      const allowed = [null, ...options.map(([value]) => value)];
      const valid = /^[0-9a-f]{16}$/.test(found.rater) && page.items[found.at]
        && ["person", "simulated"].includes(found.kind)
        && names.every((name) => found.answers[name].length === page.items.length
          && found.answers[name].every((one) => allowed.includes(one)));
      return valid ? found : null;
    } catch {
      return null; // nothing was kept, or something else
    }
  }

  function keep() {
    if (navigator.webdriver) state.kind = "simulated";
    try {
      localStorage.setItem(place, JSON.stringify(state));
    } catch {
      kept = false;
    }
  }

  function checksum(text) { // CRC-32, as zlib has it
    let sum = -1;
    for (const byte of new TextEncoder().encode(text)) {
      sum ^= byte;
      for (let bit = 0; bit < 8; bit += 1) sum = (sum >>> 1) ^ (0xedb88320 & -(sum & 1));
    }
    return (~sum >>> 0).toString(16).padStart(8, "0");
  }

  function save() {
    const { rater, kind, answers } = state;
    const content = [page.format, page.page, rater, kind, ...names.map((name) => answers[name])];
    const file = {
      format: page.format, page: page.page, rater, kind, answers,
      checksum: checksum(JSON.stringify(content)),
    };
    const blob = new Blob([JSON.stringify(file, null, 1)], { type: "application/json" });
    const url = URL.createObjectURL(blob);
    make("a", { href: url, download: `ratings-${rater}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    say(`Exported to ratings-${rater}.json. ${progress()}`);
  }

  function restart() {
    if (!confirm("Remove all answers from this browser, for another rater? Export them first.")) return;
    state = begin();
    keep();
    show();
  }

  // ---------------------------------------------------------------- what is shown

  function make(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  const main = document.querySelector("main");
  const item = make("div", { id: "item", onkeydown: press });
  const status = make("p", { id: "status" });
  status.setAttribute("role", "status");
  const button = (text, onclick) => make("button", { type: "button", textContent: text, onclick });
  const back = button("Previous", () => move(-1));
  const next = button("Next", () => move(1));
  const finish = button("Export answers", save);

  function say(text) {
    const lost = " This browser does not keep answers: export them before you close the page.";
    status.textContent = text + (kept ? "" : lost);
  }

  function progress() {
    const all = names.flatMap((name) => state.answers[name]);
    const given = all.filter((one) => one !== null).length;
    return `${given} of ${all.length} questions are answered.`;
  }

  function question(name) {
    const set = make("fieldset", { name }, make("legend", { textContent: page.questions[name] }));
    for (const [value, text, key] of options) {
      const radio = make("input", { type: "radio", name, value, checked: state.answers[name][state.at] === value });
      radio.onchange = () => answer(name, value);
      set.append(make("label", {}, radio, ` ${text} `, make("kbd", { textContent: key })));
    }
    return set;
  }

  function press(event) { // letters are keys within an item only
    const i = options.findIndex(([, , key]) => key === event.key.toLowerCase());
    if (i < 0 || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const sets = [...item.querySelectorAll("fieldset")];
    const set = event.target.closest("fieldset")
      ?? sets.find((one) => state.answers[one.name][state.at] === null) ?? sets[0];
    set.querySelectorAll("input")[i].checked = true;
    answer(set.name, options[i][0]);
    const after = sets[sets.indexOf(set) + 1];
    const radio = after && (after.querySelector("input:checked") ?? after.querySelector("input"));
    (radio ?? (next.disabled ? finish : next)).focus();
  }

  function answer(name, value) {
    state.answers[name][state.at] = value;
    keep();
    say(progress());
  }

  function move(by) {
    state.at += by;
    keep();
    show();
    item.querySelector("h2").focus();
  }

  function show() {
    const { prompt, target, texts } = page.items[state.at];
    const fact = make("p", { id: "fact", dir: "auto" }, `${prompt} `, make("strong", { textContent: target }));
    const shown = texts.map((text, i) => make("section", {},
      make("h3", { textContent: options[i][1] }), make("p", { className: "text", dir: "auto", textContent: text })));
    item.replaceChildren(
      make("h2", { tabIndex: -1, textContent: `Item ${state.at + 1} of ${page.items.length}` }),
      make("p", { className: "label", textContent: "The edited fact, which the texts should agree with:" }), fact,
      make("div", { className: "texts" }, ...shown), ...names.map(question));
    back.disabled = state.at === 0;
    next.disabled = state.at === page.items.length - 1;
    say(progress());
  }

  main.append(
    make("p", { textContent: "Each item has texts that different models wrote. Judge them by what they say: "
      + "the edited fact counts as true here, whatever you know." }),
    make("p", { className: "label", textContent: "Keys: the letters beside the answers give them, question by question; "
      + "Tab and Shift+Tab move, Enter presses a button. Answers stay in this browser and are sent nowhere." }),
    item, make("div", { className: "bar" }, back, next, finish, button("Start again", restart)), status);
  keep();
  show();
})();
