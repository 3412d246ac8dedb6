// Answers of a page in headless Chromium: how long until the first one, and what it says of photos.
//
//     npm install playwright-core
//     python -m http.server --directory site 8000 &
//     node benchmarks/web_page.mjs http://localhost:8000/ photos/*.jpg > browser.json
//     python -m benchmarks.web_page site/model.onnx browser.json
//
// CHROMIUM names the browser (/usr/bin/chromium). The page needs an example (vit_jax web --examples).

import { chromium } from 'playwright-core';

const [address, ...photos] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking'],
});

const seconds = []; // from an empty cache to the first answer
for (let load = 0; load < 5; load++) {
  const context = await browser.newContext(), page = await context.newPage();
  const begin = performance.now();
  await page.goto(`${address}#example=1`);
  await page.waitForSelector('figure', { timeout: 60000 });
  seconds.push((performance.now() - begin) / 1000);
  await context.close();
}

const page = await browser.newPage(), probabilities = {};
await page.goto(address);
for (const photo of photos) {
  await page.setInputFiles('#file', photo);
  await page.waitForSelector('figure', { timeout: 60000 });
  probabilities[photo] = JSON.parse(await page.$eval('figure', e => e.dataset.probabilities));
  await page.evaluate(() => document.getElementById('results').replaceChildren());
}
console.log(JSON.stringify({ version: browser.version(), seconds, probabilities }));
await browser.close();
