// Words: a response as text whose words can be pointed at and whose tokens are tinted by a number.

const SIGNED = { token_weight: 1, token_bonus: 0, advantage: 0, effect: 0 }; // values with a middle: tinted to both sides of it

function element(tag, options = {}, ...children) {
  const { data = {}, ...rest } = options;
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(rest)) {
    if (name in made && typeof value !== "string") made[name] = value;
    else if (name === "className" || name === "textContent") made[name] = value;
    else made.setAttribute(name, value);
  }
  Object.assign(made.dataset, data);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function digits(value, count = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not measured";
  const rounded = Number(value.toPrecision(count));
  return (Math.abs(rounded) >= 1e5 || (rounded && Math.abs(rounded) < 1e-4) ? rounded.toExponential() : String(rounded)).replace("-", "\u2212");
}
const percent = (share) => {
  const size = Math.abs(100 * share);
  return `${size >= 1e-4 ? (100 * share).toPrecision(size >= 99.95 ? 4 : size >= 10 ? 3 : 2) : size ? "under 0.0001" : 0} %`;
};
const shown = (value, about) => (about?.unit === "probability" ? (value === null ? digits(value) : percent(value))
  : digits(value) + (value !== null && ["nats"].includes(about?.unit) ? ` ${about.unit}` : ""));

function meanOf(values, start = 0, end = values?.length ?? 0) { // of what was measured; null without any
  const measured = (values ?? []).slice(start, end).filter((value) => value !== null);
  return measured.length ? measured.reduce((a, b) => a + b) / measured.length : null;
}

// The text of a response. Spaces stand between words, not in them, so that a tint covers letters only.
function writeWords(response, label) {
  const box = element("div", { className: "words", role: "group", "aria-label": label });
  response.words.forEach(([start, end], w) => {
    const word = element("span", { className: "word", role: "button", tabIndex: w ? -1 : 0, "aria-pressed": "false", data: { w } });
    let after = "";
    for (let t = start; t < end; t++) {
      const [, before, letters, behind] = /^(\s*)([\s\S]*?)(\s*)$/u.exec(response.pieces[t]);
      const blank = before.includes("\n") ? "\u23ce" : before ? "\u2423" : "\u00b7"; // marks of tokens without letters
      const special = !letters || /^<[|\uff5c/]?[^<>\s]+>$/u.test(letters);
      (t === start ? box : word).append(after, letters ? before : "");
      word.append(element("span", { className: special ? "token special" : "token", data: { t }, textContent: letters || blank }));
      after = letters ? behind : before;
    }
    box.append(word, after);
  });
  if (!response.words.length) box.append(element("em", { textContent: "(empty response)" }));
  return box;
}

// Range of a value over all responses of the viewer, so that tints can be compared.
function rangeOf(name, about, responses) {
  const seen = responses.flatMap((r) => r.values[name] ?? []).filter((value) => value !== null).sort((a, b) => a - b);
  if (!seen.length) return null;
  const gaps = responses.some((r) => !r.values[name] || r.values[name].includes(null));
  const at = (q) => seen[Math.round(q * (seen.length - 1))];
  if (name in SIGNED) {
    const middle = SIGNED[name];
    const reach = Math.max(Math.abs(at(0.99) - middle), Math.abs(at(0.01) - middle)) || 1;
    return { low: middle - reach, middle, high: middle + reach, gaps };
  }
  if (about.high === 0) return { low: at(0.01), middle: 0, high: 0, gaps };
  return { low: 0, middle: 0, high: at(0.99) || 1, gaps };
}

function tint(box, values, range, signed) {
  for (const token of box.querySelectorAll(".token")) {
    const value = values?.[token.dataset.t] ?? null;
    token.classList.toggle("unmeasured", Boolean(values) && value === null);
    token.classList.toggle("under", signed && value !== null && range && value < range.middle);
    const reach = value === null || !range ? 0
      : value >= range.middle ? (value - range.middle) / (range.high - range.middle || 1) : (range.middle - value) / (range.middle - range.low || 1);
    token.style.setProperty("--tint", (0.85 * Math.min(1, reach)).toFixed(3));
  }
}

function legend(name, about, range, several, of) { // `of`: label of the map that attention per token belongs to
  if (!range) return element("p", { className: "meta", textContent: `${about.text}: not measured` });
  const signed = name in SIGNED;
  const reversed = !signed && about.high === 0;
  const ends = reversed ? [0, range.low] : signed ? [range.low, range.middle, range.high] : [0, range.high];
  const ticks = ends.map((end) => element("span", { textContent: shown(end, about) }));
  return element("div", { className: "legend" },
    element("div", { className: signed ? "bar signed" : "bar" }),
    element("div", { className: "ticks" }, ...ticks),
    element("p", { className: "meta", textContent:
      `${about.text[0].toUpperCase()}${about.text.slice(1)}${about.unit === "nats" ? ", in nats" : ""}. ${about.note}${of && name.endsWith("_mass") ? ` Over ${of}.` : ""} The scale ends at the ` +
      `99 % quantile of ${several ? "all responses here" : "this response"}.${range.gaps ? " Dotted underline: not measured." : ""}` }));
}

// The word above or below, by where the text is on the screen.
function vertical(box, word, down) {
  const here = word.getBoundingClientRect();
  const middle = (here.left + here.right) / 2;
  let best = null;
  for (const other of box.querySelectorAll(".word")) {
    const there = other.getBoundingClientRect();
    const lines = (there.top - here.top) / Math.max(here.height, 1);
    if (down ? lines < 0.5 : lines > -0.5) continue;
    const far = 1e4 * Math.round(Math.abs(there.top - here.top)) + Math.abs((there.left + there.right) / 2 - middle);
    if (!best || far < best.far) best = { far, other };
  }
  return best?.other;
}
