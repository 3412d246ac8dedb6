// The page: photos in, probabilities and attention out, all in this browser.

import { preprocess, seen } from './resample.js';

const SHOWN = 5; // classes
const MOST_PIXELS = 40e6; // of a photo; more takes too much memory on a phone

const $ = id => document.getElementById(id);
const about = await (await fetch('model.json')).json();
document.title = $('title').textContent = about.title;

const model = load();
model.then(() => say('Ready.'), error => say(`The model cannot be loaded: ${error.message}`, true));

async function load() {
  const webgpu = about.webgpu && navigator.gpu && await navigator.gpu.requestAdapter();
  const ort = await import(webgpu ? './ort.webgpu.min.mjs' : './ort.wasm.min.mjs');
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  ort.env.wasm.wasmPaths = new URL('./', import.meta.url).href;
  const session = await ort.InferenceSession.create('model.onnx', {
    executionProviders: [webgpu ? 'webgpu' : 'wasm'],
  });
  return { ort, session };
}

function say(text, wrong = false) {
  $('state').textContent = text;
  $('state').classList.toggle('error', wrong);
}

// --- From a photo to an answer.

let last = Promise.resolve(); // one photo after the other

function classify(blob, name) {
  last = last.then(() => answer(blob, name)).catch(error => {
    say(`${name}: ${error.message}`, true);
  });
  return last;
}

async function answer(blob, name) {
  say(`${name} …`);
  const image = await decode(blob);
  const { ort, session } = await model;
  const { crop } = about.preprocessing, [height, width] = Array.isArray(crop) ? crop : [crop, crop];
  const pixels = preprocess(image, about.preprocessing).map(grey => (grey - 127.5) / 127.5);
  const begin = performance.now();
  const outputs = await session.run({
    image: new ort.Tensor('float32', pixels, [1, height, width, 3]),
  });
  const probabilities = Array.from(outputs.probabilities.data);
  if (!probabilities.every(Number.isFinite)) throw new Error('the model gives no numbers');
  const milliseconds = Math.round(performance.now() - begin);
  show(name, image, probabilities, outputs.attention);
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

// --- What is shown.

function show(name, image, probabilities, attention) {
  const figure = document.createElement('figure');
  const picture = document.createElement('div');
  picture.append(drawn(image));
  if (attention) picture.append(heat(image, attention));
  const caption = document.createElement('figcaption');
  const heading = document.createElement('h2');
  heading.textContent = name;
  const list = document.createElement('ol');
  const order = probabilities.map((p, i) => [p, i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
  for (const [probability, label] of order.slice(0, SHOWN)) {
    list.append(line(about.class_names[label], probability));
  }
  caption.append(heading, list);
  figure.append(picture, caption);
  figure.dataset.probabilities = JSON.stringify(probabilities);
  $('results').prepend(figure);
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
const asked = location.hash.match(/^#example=(\d+)$/); // a link to an answer
if (asked && about.examples[asked[1] - 1]) example(about.examples[asked[1] - 1]);
