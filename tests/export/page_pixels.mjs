// Reads images and settings from standard input, writes the pixels that the page gives the model.
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const { preprocess } = await import(pathToFileURL(process.argv[2]));
for (const { width, height, data, how } of JSON.parse(readFileSync(0))) {
  const pixels = preprocess({ width, height, data: Buffer.from(data, 'base64') }, how);
  process.stdout.write(Buffer.from(pixels.buffer));
}
