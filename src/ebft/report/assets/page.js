"use strict";
// The page's text: title, tables and commands. Whatever comes from a run is put in as text, never as markup.

const MANY = 8; // rows that push what is to be seen off the screen
const ROUNDING = 1e-12; // whitened diversities are zero but for rounding
const data = JSON.parse(document.getElementById("data").textContent);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    made.setAttribute(name, value);
  }
  made.append(...children); // strings become text nodes
  return made;
}

// Characters that would not be seen, or would change how others are seen, in a visible form; joiners of emoji stay.
function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}]/gu, (character) => {
    const code = character.codePointAt(0);
    if (character === "\n" || character === "\t" || code === 0x200c || code === 0x200d) {
      return character;
    }
    return code < 32 ? String.fromCodePoint(0x2400 + code) : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
  });
}

function format(number) {
  if (number === null || number === undefined) {
    return "\u2013";
  }
  const size = Math.abs(number) < ROUNDING ? 0 : Math.abs(number);
  const text = size === 0 ? "0"
    : Number.isInteger(number) && size < 1e15 ? number.toLocaleString("en")
    : size < 1e-3 || size >= 1e6 ? number.toExponential(2)
    : String(Number(number.toPrecision(4)));
  return text.replace(/^-|e-/g, (sign) => sign.replace("-", "\u2212"));
}

function cell(value) {
  if (value !== null && typeof value === "object") {
    const made = element("td", { class: "number" }, typeof value.mean === "string" ? value.mean : format(value.mean));
    const between = value.low !== null ? `${format(value.low)} to ${format(value.high)}`
      : value.seeds === 1 ? "one seed" : "no interval";
    made.append(element("small", {}, between));
    if (value.p !== undefined && value.p !== null) {
      made.append(element("small", {}, `p ${Number(value.p.toPrecision(2))}`));
    }
    return made;
  }
  const isNumber = typeof value === "number";
  return element("td", isNumber ? { class: "number" } : {}, typeof value === "string" ? visible(value) : format(value));
}

function table(content) {
  const numeric = content.columns.map((_, i) => i > 0 && content.rows.some((row) => row[i] !== null && typeof row[i] !== "string"));
  const head = element("tr", {}, ...content.columns.map((name, i) =>
    element("th", { scope: "col", class: numeric[i] ? "number" : "" }, visible(name))));
  const rows = content.rows.map(([first, ...others]) =>
    element("tr", {}, element("th", { scope: "row" }, visible(String(first))), ...others.map(cell)));
  const grid = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  const scrolled = element("div", { class: "scrolled", role: "region", tabindex: "0", "aria-label": content.title }, grid);
  const parts = [element("h3", {}, visible(content.title)), scrolled];
  if (content.note) {
    parts.splice(1, 0, element("p", { class: "muted" }, visible(content.note)));
  }
  return parts;
}

function folded(content) {
  const [heading, ...rest] = table(content);
  const name = `${heading.textContent} (${content.rows.length})`;
  return element("details", {}, element("summary", {}, name), ...rest);
}

function fill() {
  const { about, results, metrics, settings } = data.tables;
  const into = (id, ...parts) => document.getElementById(id).append(...parts);
  into("title", visible(data.title));
  into("made", data.made);
  into("about", ...about.flatMap((content) => content.rows.length > MANY ? [folded(content)] : table(content)));
  into("results", ...results.flatMap(table), ...metrics.flatMap(table));
  into("settings", ...settings.map(folded));
  if (data.commands.length) {
    into("settings", element("p", { class: "muted" }, "To run again:"));
    into("settings", ...data.commands.map((line) => element("pre", { class: "command", tabindex: "0" }, visible(line))));
  }
}

fill();
