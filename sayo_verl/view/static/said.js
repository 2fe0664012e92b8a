// What the shown word looked at: one sentence, and a table of numbers.

function say(viewer, response, set, w, raw, whole, left) {
  const { data } = viewer;
  const [start, end] = w === null ? [0, response.pieces.length] : response.words[w];
  const first = set.name === response.measured; // the map that the numbers per token belong to
  const perToken = !first || left ? null : response.values;
  const text = response.pieces.slice(start, end).join("").trim();
  const word = w === null ? null : `\u201c${text || "\u23ce"}\u201d`;
  const title = w === null ? `The whole ${viewer.several ? `response ${viewer.chosen + 1}` : "response"}`
    : `${word}, word ${w + 1} of ${response.words.length}${viewer.several ? ` of response ${viewer.chosen + 1}` : ""}${viewer.pinned?.[0] === viewer.chosen && viewer.pinned[1] === w ? ", pinned" : ""}`;
  const of = (map, a, b) => numbersOf(data, map, left, first ? (name) => meanOf(response.values[name], a, b) : () => null,
    perToken && [`R_a of single tokens, ${set.label} (0.5: evenly spread)`, ratioOf(data, perToken, a, b)]);
  const [mine, all] = [raw && of(raw, start, end), of(whole, 0, response.pieces.length)];
  const spoken = element("p", { "aria-live": "polite", textContent: sentenceOf(data, mine ?? all, left, mine ? "This word" : "On average a token") });
  viewer.brief.replaceChildren(element("h3", { textContent: title }), spoken);
  const parts = [];
  if (w !== null && !raw) {
    parts.push(element("p", { className: "warn", textContent:
      `Maps of single words are not on this page for ${set.label}, so the map of the whole response is shown. ` +
      (set.left_out ? "They were left out to keep the page small." : `${data.more_maps} ${set.name} stores them.`) }));
  }
  if (left) {
    if (viewer.filter === "steady" && set.steady && !set.steady.includes("1")) parts.push(element("p", { className: "note", textContent: "There are no steady tokens here." }));
    parts.push(element("p", { className: "note", textContent: `${viewer.filterNames[viewer.filter]}: ${[...left].filter((bit) => bit === "1").length} of ` +
      `${data.tokens} visual tokens are left out, and the rest is scaled to 100 %.` }));
  }
  const others = Object.keys(data.values).filter((name) => response.values[name] && !(name in { image_mass: 1, region_mass: 1, sink_mass: 1, border_mass: 1 }));
  const rows = Object.keys(all).map((name) => [name, mine?.[name], all[name]]);
  rows.push(...others.map((name) => [data.values[name].text, w === null ? null : shown(meanOf(response.values[name], start, end), data.values[name]),
    shown(meanOf(response.values[name]), data.values[name])]).filter(([, mine, all]) => all !== digits(null)));
  const header = [element("th", {}), ...(w === null ? [] : [element("th", { scope: "col", textContent: word })]), element("th", { scope: "col", textContent: "whole response" })];
  const body = rows.filter(([name]) => !name.startsWith("_")).map(([name, mine, all]) => element("tr", {}, element("th", { scope: "row", textContent: name }),
    ...(w === null ? [] : [element("td", { textContent: mine ?? "\u2013" })]), element("td", { textContent: all })));
  parts.push(element("div", { className: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ...header)), element("tbody", {}, ...body))));
  viewer.said.replaceChildren(...parts);
}

// Rows of the table; names with _ are for the sentence only.
function numbersOf(data, raw, left, measured, ratio) {
  const { region, border, tokens, region_tokens: inBoxes } = data;
  const map = without(raw, left);
  const image = measured("image_mass") ?? sum(raw);
  const rows = { _image: image, "attention on the image": percent(image) };
  const rest = left ? [...left].filter((bit) => bit === "0").length : tokens;
  const boxesLeft = !left ? inBoxes : [...(region ?? "")].filter((bit, v) => bit === "1" && left[v] === "0").length;
  const onBoxes = region ? (!left && measured("region_mass")) || sum(map, region) : left ? null : measured("region_mass");
  if (inBoxes && onBoxes !== null && boxesLeft && boxesLeft < rest) {
    const [whole, chance] = [left ? 1 : image, boxesLeft / rest];
    Object.assign(rows, {
      _boxes: onBoxes, _even: whole * chance,
      "attention on the boxes": percent(onBoxes),
      "if spread evenly over the image": percent(whole * chance),
    });
    if (ratio && ratio[1] !== null) rows[ratio[0]] = digits(ratio[1], 2);
  }
  const edge = [...(border ?? "")].filter((bit) => bit === "1").length;
  if (!left && sum(raw) > 0 && edge) {
    rows["attention on the image's border"] = percent((sum(raw, border) / sum(raw)) * image);
    rows["if spread evenly over the image "] = percent((edge / tokens) * image);
  }
  const sink = measured("sink_mass");
  if (sink !== null) rows["attention on the first token"] = percent(sink);
  return rows;
}

// Mean of SAYO's R_a of single tokens, so that a word and a response compare: R_a of pooled tokens grows with their number.
function ratioOf({ region_tokens: inBoxes, tokens }, { region_mass: boxes, image_mass: image }, start, end) {
  if (!inBoxes || !boxes || !image) return null;
  return meanOf(boxes.map((mass, t) => {
    if (mass === null || image[t] === null) return null;
    const [a, v] = [mass / inBoxes + 1e-8, image[t] / tokens + 1e-8]; // EPS of methods/region.py
    return a ** 2 / (a ** 2 + v ** 2);
  }), start, end);
}

function sentenceOf(data, rows, left, subject) {
  const boxes = data.boxes === 1 ? "box" : "boxes";
  const image = data.grids.some((grid) => grid.image) ? "images" : "image";
  const start = `${subject} put ${percent(rows._image)} of its attention on the ${image}`;
  if (rows._boxes === undefined) return `${start}.`;
  const times = rows._boxes / rows._even;
  const ratio = times > 1.05 || times < 0.95 ? `${digits(times, 2)} times as much` : "about as much";
  return left
    ? `${start}. Of the part that is shown, ${percent(rows._boxes)} is on the ${boxes}; evenly spread it would be ${percent(rows._even)}. So the ${boxes} got ${ratio}.`
    : `${start}, and ${percent(rows._boxes)} on the ${boxes}. Spread evenly over the ${image}, it would be ${percent(rows._even)} on the ${boxes}: they got ${ratio}.`
      .replace("they got", data.boxes === 1 ? "it got" : "they got");
}
