// From a decoded image to the pixels that the model sees: the same rules, in the same arithmetic, as
// vit_jax.data.preprocess. No canvas resizes anything here.

const FILTERS = { // of Pillow: how far they reach, and their weights
  box: [0.5, x => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, x => {
    x = Math.abs(x);
    if (x === 0) return 1;
    if (x >= 1) return 0;
    return Math.sin(x * Math.PI) / (x * Math.PI) * (0.54 + 0.46 * Math.cos(x * Math.PI));
  }],
  bicubic: [2, cubic],
  lanczos: [3, x => (x > -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

function cubic(x) { // Keys 1981, a = -1/2
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

// What evaluation sees of an image.
//   image: {data: bytes of red, green, blue and alpha, width, height}
//   how: the `preprocessing` of model.json
// Returns float32 [height x width x 3], grey levels from 0 to 255.
export function preprocess(image, how) {
  const [height, width] = sides(how.crop);
  const whole = box(image, how);
  const part = cut(rgb(image), image.width, whole);
  const [rows, columns] = whole.size;
  const pixels = resize(part, whole.height, whole.width, rows, columns, how);
  const top = half(rows - height, how), left = half(columns - width, how);
  const out = new Float32Array(height * width * 3);
  for (let y = 0; y < height; y++) {
    const from = ((y + top) * columns + left) * 3;
    out.set(pixels.subarray(from, from + width * 3), y * width * 3);
  }
  return how.whole_levels ? out.map(Math.floor) : out;
}

// The part of an image that the model sees, in the image's pixels: {x, y, width, height}.
export function seen(image, how) {
  const whole = box(image, how), [height, width] = sides(how.crop);
  const [rows, columns] = whole.size;
  const down = whole.height / rows, across = whole.width / columns;
  return {
    x: whole.x + half(columns - width, how) * across, y: whole.y + half(rows - height, how) * down,
    width: width * across, height: height * down,
  };
}

// The image before the crop: which part of it, resized to `size` (rows, columns).
function box(image, how) {
  const everything = { x: 0, y: 0, width: image.width, height: image.height };
  if (how.eval === 'squash') return { ...everything, size: sides(how.crop) };
  const target = sides(how.resize || how.crop);
  if (how.eval === 'squash_crop') return { ...everything, size: target };
  const most = 100 * Math.min(image.height, image.width); // nothing beyond is seen
  const y = Math.floor(Math.max(0, image.height - most) / 2);
  const x = Math.floor(Math.max(0, image.width - most) / 2);
  const height = Math.min(image.height, most), width = Math.min(image.width, most);
  let size;
  if (target[0] === target[1] && how.whole_levels) { // in float32, to the nearest
    const factor = Math.fround(target[0] / Math.min(height, width));
    size = [even(Math.fround(height * factor)), even(Math.fround(width * factor))];
  } else if (target[0] === target[1]) {
    const long = Math.floor(target[0] * Math.max(height, width) / Math.min(height, width));
    size = height <= width ? [target[0], long] : [long, target[0]];
  } else {
    const ratio = Math.min(height / target[0], width / target[1]);
    size = [Math.max(target[0], even(height / ratio)), Math.max(target[1], even(width / ratio))];
  }
  return { x, y, width, height, size };
}

function sides(size) {
  return typeof size === 'number' ? [size, size] : size;
}

function half(pixels, how) {
  return how.centre === 'half_even' ? even(pixels / 2) : Math.floor(pixels / 2);
}

function even(x) { // to the nearest whole number, a half to the even one
  const down = Math.floor(x);
  if (x - down !== 0.5) return Math.round(x);
  return down % 2 ? down + 1 : down;
}

function rgb(image) {
  const count = image.width * image.height, out = new Uint8Array(count * 3);
  for (let i = 0, j = 0; j < count * 3; i += 4, j += 3) {
    out[j] = image.data[i];
    out[j + 1] = image.data[i + 1];
    out[j + 2] = image.data[i + 2];
  }
  return out;
}

function cut(pixels, columns, { x, y, width, height }) {
  if (width === columns && y === 0 && pixels.length === width * height * 3) return pixels;
  const out = new Uint8Array(width * height * 3);
  for (let row = 0; row < height; row++) {
    const from = ((row + y) * columns + x) * 3;
    out.set(pixels.subarray(from, from + width * 3), row * width * 3);
  }
  return out;
}

function resize(pixels, height, width, rows, columns, how) {
  if (how.interpolation === 'nearest') return nearest(pixels, height, width, rows, columns);
  if (how.antialias) {
    // Each pass rounds, so that their order counts: Pillow 13's, found by comparing many sizes.
    const rowsFirst = rows < height && height - rows > 2 * (width - columns);
    if (rowsFirst) {
      pixels = whole(pixels, height, width, rows, how, true);
      height = rows;
    }
    if (width !== columns) pixels = whole(pixels, height, width, columns, how, false);
    if (height !== rows) pixels = whole(pixels, height, columns, rows, how, true);
    return Float32Array.from(pixels);
  }
  const taps = how.interpolation === 'bicubic' ? fourTaps : twoTaps;
  return twoAxes(pixels, height, width, rows, columns, taps(height, rows), taps(width, columns));
}

function nearest(pixels, height, width, rows, columns) {
  const out = new Float32Array(rows * columns * 3);
  for (let y = 0, to = 0; y < rows; y++) {
    const row = Math.floor((y + 0.5) * height / rows);
    for (let x = 0; x < columns; x++) {
      const from = (row * width + Math.floor((x + 0.5) * width / columns)) * 3;
      for (let c = 0; c < 3; c++) out[to++] = pixels[from + c];
    }
  }
  return out;
}

// Along one axis, as Pillow: whole numbers of 22 bits behind the point, rounded to grey levels.
function whole(pixels, height, width, size, how, vertical) {
  const old = vertical ? height : width, [reach, weigh] = FILTERS[how.interpolation];
  const scale = old / size, grown = Math.max(scale, 1), support = reach * grown;
  const rows = vertical ? size : height, columns = vertical ? width : size;
  const out = new Uint8Array(rows * columns * 3);
  const stride = (vertical ? width : 1) * 3, lines = vertical ? width : height;
  for (let to = 0; to < size; to++) {
    const centre = (to + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(old, Math.trunc(centre + support + 0.5));
    const weights = [];
    for (let i = first; i < end; i++) weights.push(weigh((i - centre + 0.5) / grown));
    const sum = weights.reduce((a, b) => a + b, 0);
    const parts = weights.map(w => {
      const part = w / sum * 4194304;
      return Math.trunc(part < 0 ? part - 0.5 : part + 0.5);
    });
    for (let line = 0; line < lines; line++) {
      let from = vertical ? (first * width + line) * 3 : (line * width + first) * 3;
      let red = 2097152, green = 2097152, blue = 2097152;
      for (const part of parts) {
        red += pixels[from] * part;
        green += pixels[from + 1] * part;
        blue += pixels[from + 2] * part;
        from += stride;
      }
      const place = vertical ? (to * width + line) * 3 : (line * columns + to) * 3;
      out[place] = clip(red);
      out[place + 1] = clip(green);
      out[place + 2] = clip(blue);
    }
  }
  return out;
}

function clip(x) {
  return Math.min(255, Math.max(0, Math.floor(x / 4194304)));
}

// Without antialiasing: of each new pixel the places of `count` old ones, and their weights.
function twoTaps(old, size) {
  const places = new Int32Array(2 * size), weights = new Float64Array(2 * size);
  for (let to = 0; to < size; to++) {
    const centre = (to + 0.5) * (old / size) - 0.5, first = Math.floor(centre);
    places[2 * to] = Math.max(0, first);
    places[2 * to + 1] = Math.min(old - 1, first + 1);
    weights[2 * to] = 1 - (centre - first);
    weights[2 * to + 1] = centre - first;
  }
  return { count: 2, places, weights };
}

function fourTaps(old, size) {
  const places = new Int32Array(4 * size), weights = new Float64Array(4 * size);
  for (let to = 0; to < size; to++) {
    const centre = (to + 0.5) * (old / size) - 0.5, first = Math.floor(centre) - 1;
    let sum = 0;
    for (let i = 0; i < 4; i++) {
      const place = first + i, there = place >= 0 && place < old;
      places[4 * to + i] = there ? place : 0; // outside of the image, without weight
      sum += weights[4 * to + i] = there ? cubic(centre - place) : 0;
    }
    for (let i = 0; i < 4; i++) weights[4 * to + i] /= sum;
  }
  return { count: 4, places, weights };
}

function twoAxes(pixels, height, width, rows, columns, down, across) {
  const middle = new Float32Array(rows * width * 3), line = width * 3;
  for (let tap = 0; tap < down.places.length; tap++) {
    const weight = down.weights[tap], from = down.places[tap] * line;
    const to = Math.floor(tap / down.count) * line;
    for (let i = 0; i < line; i++) middle[to + i] += pixels[from + i] * weight;
  }
  const out = new Float32Array(rows * columns * 3), { count, places, weights } = across;
  for (let y = 0, to = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++, to += 3) {
      let red = 0, green = 0, blue = 0;
      for (let tap = x * count; tap < (x + 1) * count; tap++) {
        const from = y * line + places[tap] * 3, weight = weights[tap];
        red += middle[from] * weight;
        green += middle[from + 1] * weight;
        blue += middle[from + 2] * weight;
      }
      out[to] = within(red);
      out[to + 1] = within(green);
      out[to + 2] = within(blue);
    }
  }
  return out;
}

function within(grey) { // bicubic overshoots at edges
  return Math.min(255, Math.max(0, grey));
}
