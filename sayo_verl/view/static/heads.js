// Layers and heads: a table whose cells are tinted by a number and select the map of their head.

const OF_HEADS = {
  image_mass: ["attention on the image", "probability"],
  region_mass: ["attention on the boxes", "probability"],
  box_hit: ["share of tokens whose most attended visual token is in a box", "probability"],
  spatial_entropy: ["spatial entropy: how widely attention is spread over the image; low is local", "nats"],
};

// `stored`: names of maps of the menu. `choose(name)` shows one.
function headTable(heads, stored, option, choose) {
  const names = Object.keys(heads.values);
  const menu = element("select", {}, ...names.map((name) =>
    element("option", { value: name, textContent: (OF_HEADS[name] ?? [name])[0] })));
  const spot = element("p", { className: "spot", "aria-live": "polite" });
  const space = element("div", { className: "scroll" });
  const scale = element("p", { className: "meta" });

  function fill() {
    const [label, unit] = OF_HEADS[menu.value] ?? [menu.value, ""];
    const rows = heads.values[menu.value];
    const all = rows.flat().filter((value) => value !== null);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    scale.textContent = all.length ? `From ${shown(low, { unit })} (no tint) to ${shown(high, { unit })} (full tint). ` +
      "Rows are layers, columns are heads, both from 0. Outlined heads have a map." : "not measured";
    const every = rows[0].length > 16 ? 4 : 1;
    const say = (cell) => {
      const { layer, head } = cell.dataset;
      const name = `L${layer}H${head}`;
      const value = rows[heads.layers.indexOf(Number(layer))][head];
      spot.textContent = `Layer ${layer}, head ${head}: ${shown(value, { unit })}. ` +
        (stored.has(name) ? "Enter or a click shows its map." : `Its map is not stored; ${option} ${name} stores it.`);
    };
    const body = rows.map((values, l) => element("tr", {},
      element("th", { scope: "row", textContent: heads.layers[l] }),
      ...values.map((value, h) => {
        const name = `L${heads.layers[l]}H${h}`;
        const cell = element("td", {
          tabIndex: l || h ? -1 : 0, className: stored.has(name) ? "stored" : "",
          "aria-label": `layer ${heads.layers[l]}, head ${h}: ${shown(value, { unit })}`,
          data: { layer: heads.layers[l], head: h },
        });
        cell.style.setProperty("--tint", value === null ? 0 : ((value - low) / (high - low || 1)).toFixed(3));
        return cell;
      })));
    const top = element("tr", {}, element("th", { "aria-label": "layer" }),
      ...rows[0].map((_, h) => element("th", { scope: "col", textContent: h % every ? "" : h })));
    const table = element("table", { className: "heads", role: "grid", "aria-label": label },
      element("thead", {}, top), element("tbody", {}, ...body));
    table.style.setProperty("--columns", rows[0].length);
    const pick = (cell) => {
      const name = `L${cell.dataset.layer}H${cell.dataset.head}`;
      if (stored.has(name)) choose(name);
      else say(cell);
    };
    table.addEventListener("pointerover", (event) => event.target.matches("td") && say(event.target));
    table.addEventListener("focusin", (event) => event.target.matches("td") && say(event.target));
    table.addEventListener("click", (event) => event.target.matches("td") && pick(event.target));
    table.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!event.target.matches("td")) return;
      if (event.key === "Enter" || event.key === " ") pick(event.target);
      else if (!move) return;
      event.preventDefault();
      if (!move) return;
      const row = event.target.parentElement;
      const next = table.tBodies[0].rows[row.sectionRowIndex + move[0]]?.cells[event.target.cellIndex + move[1]];
      if (!next?.matches("td")) return;
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    space.replaceChildren(table);
    spot.textContent = "";
  }

  menu.addEventListener("change", fill);
  fill();
  return element("details", { className: "of-heads" }, element("summary", { textContent: "Layers and heads" }),
    element("label", {}, "Colour by ", menu), scale, space, spot);
}
