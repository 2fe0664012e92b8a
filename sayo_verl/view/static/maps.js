// Maps: from packed text to numbers, and from numbers to colours on a canvas.
// A map is a Float32Array with one number per visual token of the prompt. Packed maps are of sayo_verl/view/maps.py.

const STOPS = [ // inferno, from dark to bright: lightness grows evenly
  [0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50],
  [252, 255, 164],
];
const TOP = 0.995; // the colour scale ends at this quantile, so that one very large value does not hide all others

async function codesOf(packed) {
  packed.codes ??= (async () => {
    const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
    packed.data = "";
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  })();
  return packed.codes;
}

function valuesOf(packed) { // the value of each code
  packed.lookup ??= Float32Array.from({ length: packed.levels + 1 }, (_, code) =>
    code && packed.high * packed.span ** ((code - packed.levels) / (packed.levels - 1)));
  return packed.lookup;
}

async function rowOf(packed, row) {
  const [codes, values, size] = [await codesOf(packed), valuesOf(packed), packed.shape[1]];
  return Float32Array.from(codes.subarray(row * size, (row + 1) * size), (code) => values[code]);
}

// Leave out tokens and divide by the rest, so that it adds up to 1. `left` is a text of 0 and 1, or null for none.
function without(map, left) {
  if (!left) return map;
  const kept = map.map((value, v) => (left[v] === "1" ? 0 : value));
  const all = sum(kept);
  return all > 0 ? kept.map((value) => value / all) : kept;
}

function sum(map, mask) {
  let total = 0;
  for (let v = 0; v < map.length; v++) if (!mask || mask[v] === "1") total += map[v];
  return total;
}

function quantile(map) {
  const sorted = map.slice().sort();
  return sorted[Math.ceil(TOP * (sorted.length - 1))] || sorted.at(-1) || 0;
}

const timesMean = (map, left) => { // the largest value over the mean of what is shown
  const count = left ? [...left].filter((bit) => bit === "0").length : map.length;
  const all = sum(map);
  return all > 0 ? (map.reduce((a, b) => Math.max(a, b), 0) * count) / all : Infinity;
};

// The end of a map's colours. At least twice the mean, so that a nearly even map does not look like a peaked one.
function topOf(map, left) {
  const count = left ? [...left].filter((bit) => bit === "0").length : map.length;
  return Math.max(quantile(map), (2 * sum(map)) / Math.max(count, 1));
}

async function quantileOfWords(packed, left) { // the largest of the words' own quantiles would be one odd word
  const tops = [];
  const step = Math.max(1, Math.floor(packed.shape[0] / 200)); // 200 words are enough for a scale
  for (let w = 0; w < packed.shape[0]; w += step) tops.push(topOf(without(await rowOf(packed, w), left), left));
  return tops.sort((a, b) => a - b)[Math.floor(0.95 * (tops.length - 1))];
}

function colour(t) { // 0..1 to [red, green, blue]
  const at = Math.min(Math.max(t, 0), 1) * (STOPS.length - 1);
  const i = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[i].map((low, c) => low + (at - i) * (STOPS[i + 1][c] - low));
}

const scaled = (value, top) => (top > 0 ? Math.min(1, Math.sqrt(value / top)) : 0);

// One cell of a grid is one pixel of its canvas, which the page enlarges without smoothing.
function draw(canvas, grid, map, top, strength) {
  const image = new ImageData(grid.cols, grid.rows);
  let peak = -1;
  for (const [start, rows, cols, row, col] of grid.tiles) {
    for (let v = 0; v < rows * cols; v++) {
      const value = map[start + v];
      const cell = (row + Math.floor(v / cols)) * grid.cols + col + (v % cols);
      const t = scaled(value, top);
      image.data.set([...colour(0.25 + 0.75 * t), 255 * Math.min(1, strength * (0.08 + 1.25 * t))], 4 * cell);
      if (peak < 0 || value > peak) [peak, canvas.dataset.peak] = [value, cell];
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

const shareOf = (grid, map) =>
  grid.tiles.reduce((total, [start, rows, cols]) => total + sum(map.subarray(start, start + rows * cols)), 0);
