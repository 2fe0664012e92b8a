// The viewer: pictures with maps, responses, and what the pointed word looked at.

const FILTERS = {
  all: "as measured",
  border: "without the image's border",
  steady: "without border and steady tokens",
};
const FACTS = { // names for readers; others are shown as they are
  trajectory_weight: "factor of the trajectory", attention_kernel: "attention kernel", query_row: "row of a token",
};
const HOW = "Point at a word, tap it, or press the right arrow key, to see where the model looked while it wrote the word. A click or Enter pins it.";
const COARSE = 100; // visual tokens of a picture below which its cells hide what is in it
const SAID = ["image_mass", "sink_mass", "border_share", "border_chance", "region_mass", "region_share", "region_chance", "R_a", "R_a_single"]; // in the table
const FIRST_VALUES = ["token_weight", "token_bonus", "region_mass", "image_mass"]; // the tint at first, in this order

class Viewer {
  constructor(root) {
    this.root = root;
    this.data = JSON.parse(document.getElementById(root.dataset.island).textContent);
    this.everything = this.data.states.flatMap((state) => state.responses);
    this.several = this.data.states.some((state) => state.responses.length > 1);
    Object.assign(this, { state: 0, chosen: 0, pointed: null, pinned: null, filter: "all", scale: "own", job: 0 });
    const coarse = this.data.tokens / this.data.grids.length < COARSE;
    root.classList.toggle("coarse", coarse);
    this.strength = coarse ? 0.5 : 0.8;
    root.style.setProperty("--strength", this.strength);
    this.left = root.querySelector(".left");
    this.right = root.querySelector(".right");
    this.canvases = [...root.querySelectorAll("canvas")];
    this.copyPictures();
    this.buildLeft();
    this.buildRight();
    this.showState(this.data.states.length - 1);
  }

  copyPictures() { // a picture with several resolutions is stored once
    let source = "";
    for (const image of this.root.querySelectorAll("img")) {
      if (image.hasAttribute("src")) source = image.src;
      else image.src = source;
    }
  }

  // --- parts of the page ---

  buildLeft() {
    const maps = new Map();
    for (const response of this.everything) {
      for (const map of response.maps) {
        const known = maps.get(map.name) ?? { label: map.label, words: false, steady: false };
        maps.set(map.name, { ...known, words: known.words || Boolean(map.words), steady: known.steady || Boolean(map.steady) });
      }
    }
    this.maps = maps;
    this.map = maps.keys().next().value ?? null;
    this.scaleBar = element("div", { className: "scale" });
    this.said = element("div", { className: "said" });
    this.menu = this.select([...maps].map(([name, map]) => [name, map.label + (map.words ? "" : " (whole response only)")]),
      (name) => this.update({ map: name }));
    const steady = [...maps.values()].some((map) => map.steady);
    const inside = this.data.border !== null; // a small grid has hardly any tokens inside its border
    const filters = Object.entries(FILTERS).filter(([key]) => (key !== "steady" || steady) && (key !== "border" || inside))
      .map(([key, label]) => [key, inside ? label : label.replace("border and ", "")]);
    const strength = element("input", { type: "range", min: "0", max: "1", step: "0.05", value: String(this.strength) });
    strength.addEventListener("input", () => {
      this.root.style.setProperty("--strength", strength.value);
      this.update({ strength: Number(strength.value) });
    });
    this.filterNames = Object.fromEntries(filters);
    const filterMenu = this.select(filters, (filter) => this.update({ filter }));
    const scaleMenu = this.select([["own", "ends at this word's largest values"], ["shared", "the same for all words"]], (scale) => this.update({ scale }));
    const controls = element("div", { className: "controls" },
      element("label", {}, element("span", { textContent: "Layers and heads" }), this.menu),
      element("label", {}, element("span", { textContent: "Visual tokens" }), filterMenu),
      element("label", {}, element("span", { textContent: "Colour scale" }), scaleMenu),
      element("label", {}, element("span", { textContent: "Strength of the map" }), strength),
      element("div", { className: "checks" }, this.check("grid", "no-grid", this.data.tokens / this.data.grids.length <= 1200),
        this.data.boxes ? this.check("boxes", "no-boxes", true) : null, this.alone()));
    this.brief = element("div", { className: "brief" });
    this.left.querySelector(".top").append(this.brief);
    this.left.append(this.scaleBar, ...(maps.size ? [controls] : []), this.said);
  }

  buildRight() {
    const { states, values } = this.data;
    const parts = [];
    if (states.length > 1) {
      this.slider = element("input", { type: "range", min: "0", max: String(states.length - 1), step: "1", "aria-label": "state" });
      this.slider.addEventListener("input", () => this.showState(Number(this.slider.value)));
      this.stateName = element("output", {});
      parts.push(element("div", { className: "states" }, this.slider, this.stateName));
    }
    const measured = Object.keys(values).filter((name) => this.everything.some((r) => (r.values[name] ?? []).some((v) => v !== null)));
    this.tintBy = FIRST_VALUES.find((name) => measured.includes(name)) ?? "";
    const options = [["", "no tint"], ...measured.map((name) => [name, values[name].text])];
    const menu = this.select(options, (name) => { this.tintBy = name; this.tintWords(); });
    menu.value = this.tintBy;
    this.legend = element("div");
    this.responses = element("div", { className: this.several ? "group" : "single" });
    this.common = element("div");
    parts.push(element("p", { className: "meta", textContent: HOW }), element("label", { className: "tint-by" }, "Words are tinted by ", menu), this.legend, this.responses, this.common);
    this.right.append(...parts);
    this.heads = element("div");
    this.root.querySelector(".below").prepend(this.heads);
    this.root.addEventListener("keydown", (event) => event.key === "Escape" && this.update({ pinned: null, pointed: null }));
  }

  select(options, change) {
    const menu = element("select", {}, ...options.map(([value, label]) => element("option", { value, textContent: label })));
    menu.addEventListener("change", () => change(menu.value));
    return menu;
  }

  alone() { // the picture in its own colours
    const box = element("input", { type: "checkbox" });
    box.addEventListener("change", () => this.root.classList.toggle("alone", box.checked));
    return element("label", {}, box, " picture alone");
  }

  check(label, without, now) {
    const box = element("input", { type: "checkbox", checked: now });
    this.root.classList.toggle(without, !now);
    box.addEventListener("change", () => this.root.classList.toggle(without, !box.checked));
    return element("label", {}, box, ` ${label}`);
  }

  // --- responses ---

  get now() { return this.data.states[this.state].responses; }

  showState(state) {
    Object.assign(this, { state, pointed: null, pinned: null, chosen: Math.min(this.chosen, Math.max(0, this.data.states[state].responses.length - 1)) });
    const { label, responses } = this.data.states[state];
    if (this.slider) {
      const most = Math.max(...this.data.states.map((s) => s.responses.length));
      const missing = responses.length < most ? `. ${responses.length} of ${most} responses were recorded` : "";
      this.slider.value = String(state);
      this.slider.setAttribute("aria-valuetext", label);
      this.stateName.textContent = `${label} (${state + 1} of ${this.data.states.length})${missing}`;
    }
    this.boxes = responses.map((response, r) => this.words(response, r));
    this.cards = responses.map((response, r) => this.card(response, r));
    const advantages = responses.map((response) => response.facts.advantage);
    const ordered = this.cards.map((card, r) => [card, r]);
    if (advantages.every((value) => typeof value === "number")) ordered.sort((a, b) => advantages[b[1]] - advantages[a[1]]);
    this.responses.replaceChildren(...ordered.map(([card]) => card));
    this.common.replaceChildren(...(this.several && responses.length > 1 ? responses[0].notes : [])
      .filter((note) => responses.every((other) => other.notes.includes(note)))
      .map((note) => element("p", { className: "note", textContent: note })));
    this.tintWords();
    this.showHeads();
    this.root.classList.toggle("short", this.right.offsetHeight < 1.5 * innerHeight);
    this.show();
  }

  words(response, r) {
    const name = this.several ? `Response ${r + 1}` : "Response";
    const box = writeWords(response, `${name}, ${response.words.length} words. Arrow keys choose a word, Enter pins it, Escape releases it.`);
    const at = (event) => event.target.closest?.(".word");
    box.addEventListener("pointerover", (event) => {
      if (at(event) && event.pointerType !== "touch") this.point(r, Number(at(event).dataset.w));
    });
    box.addEventListener("pointerleave", () => this.update({ pointed: null }));
    box.addEventListener("focusin", (event) => at(event)?.matches(":focus-visible") && this.point(r, Number(at(event).dataset.w)));
    box.addEventListener("focusout", () => this.update({ pointed: null }));
    box.addEventListener("click", (event) => at(event) && this.pin(r, Number(at(event).dataset.w)));
    box.addEventListener("keydown", (event) => {
      const word = at(event);
      if (!word) return;
      const all = [...box.querySelectorAll(".word")];
      const w = Number(word.dataset.w);
      const next = { ArrowLeft: all[w - 1], ArrowRight: all[w + 1], Home: all[0], End: all.at(-1) }[event.key]
        ?? (event.key === "ArrowUp" ? vertical(box, word, false) : event.key === "ArrowDown" ? vertical(box, word, true) : null);
      if (event.key === "Enter" || event.key === " ") this.pin(r, w);
      else if (!next) return;
      event.preventDefault();
      if (!next) return;
      word.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      this.point(r, Number(next.dataset.w));
    });
    return box;
  }

  card(response, r) {
    const facts = Object.entries(response.facts).filter(([name]) =>
      name !== "accuracy" && !(response.maps.length && SAID.includes(name)) && !(this.several && name === "query_row"));
    const list = facts.length ? element("dl", { className: "facts" }, ...facts.flatMap(([name, fact]) =>
      [element("dt", { textContent: FACTS[name] ?? name }), element("dd", { textContent: typeof fact === "string" ? fact : digits(fact) })])) : null;
    const common = (note) => this.several && this.now.length > 1 && this.now.every((other) => other.notes.includes(note));
    const notes = response.notes.filter((note) => !common(note)).map((note) => element("p", { className: "note", textContent: note }));
    const { accuracy } = response.facts;
    const verdict = typeof accuracy !== "number" ? "" : accuracy >= 1 ? "right" : accuracy > 0 ? `partly right (${digits(accuracy)})` : "wrong";
    if (!this.several) {
      const said = verdict && element("p", { className: verdict === "right" ? "ok" : "warn", textContent: `The answer is ${verdict}.` });
      return element("article", {}, this.boxes[r], said || null, list, ...notes);
    }
    const choose = element("button", { type: "button", textContent: `Response ${r + 1}`, title: "shows the map of this whole response" });
    choose.addEventListener("click", () => this.update({ chosen: r, pinned: null, pointed: null }));
    const kind = verdict === "right" ? "right" : verdict ? "wrong" : "unmarked";
    return element("article", { className: `card ${kind}` },
      element("header", {}, choose, verdict ? element("strong", { className: "verdict", textContent: verdict }) : null), this.boxes[r], list, ...notes);
  }

  tintWords() {
    const about = this.data.values[this.tintBy];
    const range = about ? rangeOf(this.tintBy, about, this.everything) : null;
    this.legend.replaceChildren(...(about ? [legend(this.tintBy, about, range, this.everything.length > 1,
      this.now.flatMap((r) => r.maps.filter((map) => map.name === r.measured))[0]?.label)] : []));
    this.boxes.forEach((box, r) => tint(box, about ? this.now[r].values[this.tintBy] ?? [] : null, range, this.tintBy in SIGNED));
  }

  showHeads() {
    const response = this.now[this.chosen];
    const open = this.heads.querySelector("details")?.open;
    this.heads.replaceChildren(...(response?.heads ? [headTable(response.heads, new Set(this.maps.keys()), this.data.more_maps, (name) => {
      this.menu.value = name;
      this.update({ map: name });
    })] : []));
    if (open) this.heads.querySelector("details").open = true;
  }

  // --- choice ---

  point(r, w) { this.update({ chosen: r, pointed: [r, w] }); }

  pin(r, w) {
    const same = this.pinned?.[0] === r && this.pinned[1] === w;
    this.update({ chosen: r, pinned: same ? null : [r, w], pointed: same ? null : [r, w] });
  }

  update(change) {
    const before = this.chosen;
    Object.assign(this, change);
    if (!this.pointed && this.pinned) this.chosen = this.pinned[0];
    if (this.chosen !== before) this.showHeads();
    this.show();
  }

  // --- the map ---

  left_out(set) {
    const { border } = this.data;
    if (this.filter === "all") return null;
    if (this.filter === "border" || !set.steady) return border;
    return [...set.steady].map((bit, v) => (bit === "1" || border?.[v] === "1" ? "1" : "0")).join("");
  }

  async show() {
    const job = ++this.job;
    const [r, w] = this.pointed ?? this.pinned ?? [this.chosen, null];
    const response = this.now[r];
    this.mark(r, w);
    const set = response?.maps.find((map) => map.name === this.map);
    if (!set) {
      this.blank(!this.map ? "No maps are stored." : response ? "This response has no such map." : "No response was recorded here.");
      return;
    }
    if (typeof DecompressionStream === "undefined") {
      this.blank("This browser cannot unpack the maps, because it lacks DecompressionStream. Chrome and Edge from 103, Firefox from 113 and Safari from 16.4 have it.");
      return;
    }
    const ofWord = w !== null && set.words !== null;
    const whole = await rowOf(set.total, 0);
    const raw = ofWord ? await rowOf(set.words, w) : whole;
    const left = this.left_out(set);
    const top = this.scale === "own" || !set.words ? topOf(without(raw, left), left) : await this.sharedTop(set, left);
    if (job !== this.job) return; // another word was pointed at meanwhile
    const map = without(raw, left);
    this.data.grids.forEach((grid, g) => {
      draw(this.canvases[g], grid, map, top, this.strength);
      const share = this.data.grids.length > 1 ? `: ${percent(shareOf(grid, map))} of ${left ? "what is shown" : "attention"}` : "";
      this.root.querySelectorAll(".share")[g].textContent = share;
    });
    Object.assign(this.root.dataset, { response: r, word: ofWord ? w : "", share: sum(raw), top, map: set.name });
    this.root.dataset.drawn ??= performance.now();
    this.drawScale(top, left, ofWord, timesMean(map, left));
    say(this, response, set, w, ofWord ? raw : null, whole, left);
  }

  async sharedTop(set, left) {
    set.tops ??= {};
    return (set.tops[this.filter] ??= await quantileOfWords(set.words, left));
  }

  blank(why) {
    this.canvases.forEach((canvas) => canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height));
    this.scaleBar.replaceChildren();
    this.brief.replaceChildren(element("p", { className: "warn", textContent: why }));
    this.said.replaceChildren();
  }

  mark(r, w) {
    this.root.querySelectorAll(".word.now").forEach((word) => word.classList.remove("now"));
    this.root.querySelectorAll('.word[aria-pressed="true"]').forEach((word) => word.setAttribute("aria-pressed", "false"));
    const word = (at) => this.boxes[at[0]]?.querySelector(`[data-w="${at[1]}"]`);
    if (w !== null) word([r, w])?.classList.add("now");
    if (this.pinned) word(this.pinned)?.setAttribute("aria-pressed", "true");
    this.cards.forEach((card, c) => card.classList.toggle("chosen", c === r));
  }

  drawScale(top, left, ofWord, times) {
    const stops = [0, 0.25, 0.5, 0.75, 1].map((t) => `rgb(${colour(0.25 + 0.75 * t).map(Math.round).join(" ")})`).join(",");
    const bar = element("div", { className: "bar" });
    bar.style.background = `linear-gradient(90deg, ${stops})`;
    const ticks = [0, 0.25, 1].map((share) => element("span", { textContent: (share === 1 ? "\u2265 " : "") + percent(share * top) }));
    const end = this.scale === "shared" ? "the 95 % quantile of the words' own ends (of each the 99.5 % quantile of its map)"
      : `the 99.5 % quantile of ${ofWord ? "this word" : "the whole response"}, but not below twice the mean`;
    const even = times < 1.5 ? element("p", { textContent: `Nearly even: the largest value is ${digits(times, 2)} times the mean.` }) : null;
    this.scaleBar.replaceChildren(...(even ? [even] : []), bar, element("div", { className: "ticks" }, ...ticks), element("p", { className: "meta", textContent:
      `${left ? "Share of the rest of the image's attention" : "Attention"} per visual token, on a square-root scale that ends at ${end}.` }));
  }
}

const viewers = [...document.querySelectorAll(".viewer")].map((root) => new Viewer(root));

// Without a focus, left and right go to the words of the viewer that is on the screen.
document.addEventListener("keydown", (event) => {
  if (document.activeElement !== document.body || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const viewer = viewers.find(({ root }) => root.getBoundingClientRect().bottom > innerHeight / 3);
  const words = viewer?.boxes[viewer.chosen]?.querySelector('.word[tabindex="0"]');
  if (!words) return;
  event.preventDefault();
  words.focus();
  viewer.point(viewer.chosen, Number(words.dataset.w));
});
