// Runs the models beside the page, which stays quick. A message {id, model, inputs} is answered by
// {id, outputs} or {id, error}; {ready: model} and {ready: model, error} tell of loading.

// A graph of one Identity: with it the runtime is loaded and started while the model is on its way.
const START = 'CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBE=';
const about = fetch('model.json').then(response => response.json());
const runtime = load();
const sessions = { image: open('image', 'model.onnx') };
sessions.text = about.then(async ({ towers }) => {
  if (!towers) return;
  await sessions.image.catch(() => {}); // the photos come first
  return open('text', 'text.onnx');
});
sessions.text.catch(() => {}); // who asks for it is told

async function load() {
  const plain = import('./ort.wasm.min.mjs');
  const { webgpu } = await about;
  const gpu = webgpu && navigator.gpu && await navigator.gpu.requestAdapter();
  const ort = await (gpu ? import('./ort.webgpu.min.mjs') : plain);
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  ort.env.wasm.wasmPaths = new URL('./', import.meta.url).href;
  await ort.InferenceSession.create(Uint8Array.from(atob(START), c => c.charCodeAt(0)));
  const executionProviders = [gpu ? 'webgpu' : 'wasm'];
  // On processors there is nothing to gain: it would only make all weights float32, which takes time.
  const graphOptimizationLevel = gpu ? 'all' : 'disabled';
  return { ort, options: { executionProviders, graphOptimizationLevel } };
}

async function open(name, file) {
  try {
    const [bytes, { ort, options }] = await Promise.all([download(file), runtime]);
    const session = await ort.InferenceSession.create(bytes, options);
    postMessage({ ready: name });
    return session;
  } catch (error) {
    postMessage({ ready: name, error: error.message });
    throw error;
  }
}

async function download(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  return new Uint8Array(await response.arrayBuffer());
}

let last = Promise.resolve(); // a session computes one thing at a time

onmessage = ({ data }) => {
  last = last.then(() => answer(data));
};

async function answer({ id, model, inputs }) {
  try {
    const session = await sessions[model], { ort } = await runtime;
    const tensors = Object.entries(inputs).map(
      ([name, { type, data, dims }]) => [name, new ort.Tensor(type, data, dims)]);
    const begin = performance.now();
    const found = await session.run(Object.fromEntries(tensors));
    const outputs = {};
    for (const [name, { data, dims }] of Object.entries(found)) outputs[name] = { data, dims };
    postMessage({ id, outputs, milliseconds: Math.round(performance.now() - begin) });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
}
