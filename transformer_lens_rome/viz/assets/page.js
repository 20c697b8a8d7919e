// What every page has: the reader's view and notes, kept in the address and in a saved copy.
"use strict";

const tlr = (() => {
  const source = document.documentElement.outerHTML; // as it was written: nothing has run yet
  const state = read();

  function read() {
    const written = document.querySelector(".tlr-state").textContent;
    for (const text of [location.hash.slice(1), encodeURIComponent(written)]) {
      try {
        const found = JSON.parse(decodeURIComponent(text));
        if (found && typeof found === "object") return found;
      } catch { /* an address that somebody else made up */ }
    }
    return {};
  }

  function keep(name, value) {
    state[name] = value;
    try {
      history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(state)));
    } catch { /* a page inside a notebook has no address of its own */ }
  }

  function copy() {
    const json = JSON.stringify(state).replace(/</g, "\\u003c");
    const place = /(<script[^>]* class="tlr-state"[^>]*>)[^<]*/;
    return "<!DOCTYPE html>" + source.replace(place, (_, start) => start + json);
  }

  function make(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function choice(label, options, chosen, changed) {
    const list = make("select", { onchange: () => changed(list.value) });
    for (const [value, text] of options) {
      list.append(make("option", { value, textContent: text, selected: value === chosen }));
    }
    return make("label", {}, `${label} `, list);
  }

  function save() {
    const url = URL.createObjectURL(new Blob([copy()], { type: "text/html" }));
    make("a", { href: url, download: `${document.title || "page"}.html` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  function toolbar(main) {
    const themes = [["light dark", "as the system"], ["light", "light"], ["dark", "dark"]];
    const paint = (theme) => {
      for (const part of [document.body, main]) part.style.colorScheme = theme;
    };
    const theme = themes.some(([name]) => name === state.theme) ? state.theme : "light dark";
    paint(theme);
    const notes = make("textarea", { rows: 2, value: String(state.notes ?? "") });
    notes.oninput = () => keep("notes", notes.value);
    main.append(make("footer", { className: "tlr-bar" },
      make("label", { className: "tlr-notes" }, "Notes, kept in the address and in a saved copy ", notes),
      choice("Colours", themes, theme, (name) => { paint(name); keep("theme", name); }),
      make("button", { type: "button", textContent: "Save a copy", onclick: save })));
  }

  function fit() { // a frame in a notebook is as high as its page
    try {
      const frame = window.frameElement;
      if (!frame) return;
      const measure = () => { frame.style.height = `${document.body.offsetHeight + 4}px`; };
      new ResizeObserver(measure).observe(document.body);
    } catch { /* a frame of another origin scrolls */ }
  }

  return { state, keep, copy, make, choice, toolbar, fit };
})();

tlr.toolbar(document.querySelector(".tlr"));
tlr.fit();
