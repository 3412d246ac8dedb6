// The page: photos in, probabilities and attention out, all in this browser.

import { preprocess, seen } from './resample.js';

const SHOWN = 5; // classes
const MOST_PIXELS = 40e6; // of a photo; more takes too much memory on a phone

const worker = new Worker('worker.js', { type: 'module' }); // begins to load at once
const asked = new Map(); // what it has not answered yet, by number
let count = 0;
const $ = id => document.getElementById(id);
worker.onmessage = ({ data }) => {
  if (data.ready) {
    if (data.error) say(`The model cannot be loaded: ${data.error}`, true);
    else if (data.ready === 'image' && !asked.size) say('Ready.');
    return;
  }
  const { resolve, reject } = asked.get(data.id);
  asked.delete(data.id);
  if (data.error) reject(new Error(data.error));
  else resolve(data);
};
worker.onerror = () => say('This browser cannot run the model: it has no modules in workers.', true);
const about = await (await fetch('model.json')).json();
document.title = $('title').textContent = about.title;

// Computes a model: {outputs: {name: {data, dims}}, milliseconds}.
//   model: 'image' or 'text'; inputs: {name: {type, data, dims}}
function run(model, inputs) {
  return new Promise((resolve, reject) => {
    const id = count++;
    asked.set(id, { resolve, reject });
    worker.postMessage({ id, model, inputs });
  });
}

function say(text, wrong = false) {
  $('state').textContent = text;
  $('state').classList.toggle('error', wrong);
}

// --- From a photo to an answer.

let last = Promise.resolve(); // one thing after the other

function queue(work, name = '') {
  last = last.then(work).catch(error => say(`${name}${name && ': '}${error.message}`, true));
  return last;
}

function classify(blob, name) {
  return queue(() => answer(blob, name), name);
}

async function answer(blob, name) {
  say(`${name} …`);
  const image = await decode(blob);
  const { crop } = about.preprocessing, [height, width] = Array.isArray(crop) ? crop : [crop, crop];
  const pixels = preprocess(image, about.preprocessing).map(grey => (grey - 127.5) / 127.5);
  const { outputs, milliseconds } = await run('image', {
    image: { type: 'float32', data: pixels, dims: [1, height, width, 3] },
  });
  const found = Array.from((outputs.probabilities ?? outputs.features).data);
  if (!found.every(Number.isFinite)) throw new Error('the model gives no numbers');
  const photo = show(name, image, outputs.attention);
  if (texts) {
    photo.features = found;
    compare(photo);
    rank();
  } else {
    list(photo, about.class_names, found);
  }
  say(`Answered in ${milliseconds} ms.`);
}

// {data, width, height}: bytes of red, green, blue and alpha, turned as the photo says.
async function decode(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { premultiplyAlpha: 'none', colorSpaceConversion: 'none' });
  } catch {
    throw new Error('this is not an image that this browser reads');
  }
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) {
    throw new Error(`${width} x ${height} pixels are more than this page takes`);
  }
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { data: context.getImageData(0, 0, width, height).data, width, height };
}

// --- Classes and searches in words, of a model with a text tower.

const { Texts, dot } = about.towers ? await import('./texts.js') : {};
const texts = about.towers && new Texts(about, run);
const photos = []; // {figure, list, fit, features}, the newest first; of a model with a text tower
let classes = { names: [], features: [] }, query; // what photos are compared with

async function read() {
  const names = [...new Set($('classes').value.split(/[,\n]/).map(name => name.trim()))].filter(Boolean);
  const prompt = $('prompt').value, words = $('query').value.trim();
  if (names.length && !prompt.includes('{}')) {
    throw new Error('the prompt has to have {} in the place of the class');
  }
  const tell = (done, all) => say(`Reading the texts: ${done} of ${all} …`);
  const found = await texts.classes(names, prompt, tell);
  query = words && await texts.features(words);
  classes = found;
  photos.forEach(compare);
  rank();
  if (!names.length && !words) say('Type classes, or what to search for.');
  else say(photos.length ? 'Compared.' : 'Read; now add photos.');
}

function compare(photo) {
  if (classes.names.length) list(photo, classes.names, texts.probabilities(photo.features, classes));
  else photo.list.replaceChildren();
}

// Photos that fit the search best come first; without a search, the newest.
function rank() {
  for (const photo of photos) photo.cosine = query ? dot(photo.features, query) : undefined;
  const order = query ? [...photos].sort((a, b) => b.cosine - a.cosine) : photos;
  order.forEach((photo, i) => {
    photo.fit.hidden = !query;
    photo.fit.textContent = query ? `${i + 1}. Cosine with the search: ${photo.cosine.toFixed(3)}` : '';
  });
  $('results').replaceChildren(...order.map(photo => photo.figure));
}

if (texts) {
  $('words').hidden = false;
  $('prompt').value = about.towers.prompt;
  $('classes').value = about.towers.classes.join(', ');
  $('words').addEventListener('submit', event => {
    event.preventDefault();
    queue(read);
  });
  if ($('classes').value) queue(read);
}

// --- What is shown.

function show(name, image, attention) {
  const figure = document.createElement('figure');
  const picture = document.createElement('div');
  picture.append(drawn(image));
  if (attention) picture.append(heat(image, attention));
  const caption = document.createElement('figcaption');
  const heading = document.createElement('h2');
  heading.textContent = name;
  const fit = document.createElement('p'), best = document.createElement('ol');
  fit.hidden = true;
  caption.append(heading, fit, best);
  figure.append(picture, caption);
  $('results').prepend(figure);
  const photo = { figure, fit, list: best };
  if (texts) photos.unshift(photo);
  return photo;
}

function list(photo, names, probabilities) {
  const order = probabilities.map((p, i) => [p, i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  photo.list.replaceChildren(...order.slice(0, SHOWN).map(([p, label]) => line(names[label], p)));
  photo.figure.dataset.probabilities = JSON.stringify(probabilities);
}

function line(name, probability) {
  const item = document.createElement('li'), words = document.createElement('span');
  const number = document.createElement('b'), meter = document.createElement('meter');
  item.className = 'class';
  number.textContent = `${(100 * probability).toFixed(1)} %`;
  words.append(name, number);
  meter.value = probability;
  meter.setAttribute('aria-label', name);
  item.append(words, meter);
  return item;
}

function drawn({ data, width, height }) {
  const canvas = document.createElement('canvas');
  const whole = new OffscreenCanvas(width, height);
  whole.getContext('2d').putImageData(new ImageData(data, width, height), 0, 0);
  const scale = Math.min(1, 640 / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext('2d').drawImage(whole, 0, 0, canvas.width, canvas.height);
  return canvas;
}

// How much the last block looks at each patch: white where most, over the part that is seen.
function heat(image, attention) {
  const [, layers, heads, tokens] = attention.dims;
  const { grid: [rows, columns], prefix, class_token: reads } = about;
  const weights = attention.data, values = new Float32Array(rows * columns);
  const block = (layers - 1) * heads * tokens * tokens;
  for (let head = 0; head < heads; head++) {
    for (let query = reads ? 0 : prefix; query < (reads ? 1 : tokens); query++) {
      const row = block + (head * tokens + query) * tokens + prefix;
      for (let i = 0; i < values.length; i++) values[i] += weights[row + i];
    }
  }
  const most = Math.max(...values);
  const map = new ImageData(columns, rows);
  values.forEach((value, i) => map.data.set([0, 0, 0, 200 * (1 - value / most)], 4 * i));
  const small = new OffscreenCanvas(columns, rows);
  small.getContext('2d').putImageData(map, 0, 0);
  const canvas = drawn(image), context = canvas.getContext('2d');
  const scale = canvas.width / image.width, part = seen(image, about.preprocessing);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(small, part.x * scale, part.y * scale, part.width * scale, part.height * scale);
  canvas.className = 'heat';
  canvas.hidden = !$('attention').checked;
  return canvas;
}

// --- Where photos come from.

function take(files) {
  for (const file of files) classify(file, file.name);
}

$('file').addEventListener('change', event => {
  take(event.target.files);
  event.target.value = ''; // so that the same photo can be chosen again
});
for (const kind of ['dragenter', 'dragover', 'dragleave', 'drop']) {
  document.addEventListener(kind, event => {
    event.preventDefault();
    document.body.classList.toggle('drop', kind === 'dragenter' || kind === 'dragover');
    if (kind === 'drop') take(event.dataTransfer.files);
  });
}
document.addEventListener('paste', event => take(event.clipboardData.files));

$('overlay').hidden = !about.attention;
$('attention').addEventListener('change', event => {
  for (const canvas of document.querySelectorAll('canvas.heat')) canvas.hidden = !event.target.checked;
});

let stream;

$('camera').addEventListener('click', async () => {
  if (stream) return close();
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } });
  } catch (error) {
    return say(`The camera cannot be used: ${error.message}`, true);
  }
  $('video').srcObject = stream;
  $('live').hidden = false;
  $('camera').textContent = 'Close the camera';
  $('shoot').focus();
});

function close() {
  for (const track of stream.getTracks()) track.stop();
  stream = undefined;
  $('live').hidden = true;
  $('camera').textContent = 'Use the camera';
}

$('shoot').addEventListener('click', async () => {
  const { videoWidth: width, videoHeight: height } = $('video');
  if (!width) return;
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext('2d').drawImage($('video'), 0, 0);
  classify(await canvas.convertToBlob(), 'camera'); // PNG: nothing is lost
});

about.examples.forEach((file, i) => {
  const item = document.createElement('li'), button = document.createElement('button');
  const picture = document.createElement('img');
  picture.src = file;
  picture.alt = `Example ${i + 1}`;
  button.type = 'button';
  button.append(picture);
  button.addEventListener('click', () => example(file));
  item.append(button);
  $('examples').append(item);
});

async function example(file) {
  await classify(await (await fetch(file)).blob(), file);
}

$('footer').textContent = about.footer;
const link = location.hash.match(/^#example=(\d+)$/); // a link to an answer
if (link && about.examples[link[1] - 1]) example(about.examples[link[1] - 1]);
