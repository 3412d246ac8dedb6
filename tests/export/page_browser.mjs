// Uses a page in headless Chromium as a visitor would, and writes what it showed, as JSON.
// Standard input: {playwright, browser, address, photos, words, pictures}
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const { playwright, browser: executablePath, address, photos, words, pictures } =
  JSON.parse(readFileSync(0));
const { chromium } = await import(pathToFileURL(`${playwright}/index.mjs`));
const browser = await chromium.launch({
  executablePath,
  args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking',
    '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'],
});
const context = await browser.newContext({ viewport: { width: 1280, height: 800 } });
const page = await context.newPage(), told = { errors: [], requests: [] };
page.on('pageerror', error => told.errors.push(error.message));
page.on('console', message => message.type() === 'error' && told.errors.push(message.text()));
page.on('request', request => told.requests.push(request.url()));
await page.addInitScript(() => {
  globalThis.texts = 0; // how many the worker was asked for
  const post = Worker.prototype.postMessage;
  Worker.prototype.postMessage = function (data, ...rest) {
    if (data.model === 'text') globalThis.texts++;
    return post.call(this, data, ...rest);
  };
});

const figures = () => page.$$eval('figure', all => all.map(figure => ({
  name: figure.querySelector('h2').textContent,
  first: figure.querySelector('li.class')?.textContent,
  fit: figure.querySelector('figcaption p').textContent,
  heat: !!figure.querySelector('canvas.heat'),
  probabilities: figure.dataset.probabilities && JSON.parse(figure.dataset.probabilities),
})));
const state = () => page.textContent('#state');
const waitFor = text => page.waitForFunction(
  text => document.getElementById('state').textContent.includes(text), text, { timeout: 60000 });
const count = n => page.waitForFunction(
  n => document.querySelectorAll('figure').length === n, n, { timeout: 60000 });

if (!words) { // a classifier, opened by a link to an answer
  await page.goto(`${address}#example=1`);
  await count(1);
  told.figures = await figures();
  told.text = await page.textContent('#results');
} else {
  await page.goto(address);
  await waitFor('now add photos'); // the class that the page begins with is read
  // By the keyboard alone: tab to the fields, type, Enter.
  const type = async (id, text) => {
    for (let i = 0; i < 30 && await page.evaluate(() => document.activeElement.id) !== id; i++) {
      await page.keyboard.press('Tab');
    }
    await page.keyboard.press('Control+A');
    await page.keyboard.type(text);
  };
  await type('classes', words.classes);
  await type('prompt', 'no place');
  await page.keyboard.press('Enter');
  await waitFor('the prompt has to have {}');
  await page.keyboard.press('Shift+Tab');
  await type('prompt', words.prompt);
  await page.keyboard.press('Enter');
  await waitFor('now add photos');
  // One photo is chosen, the others are dropped.
  await page.setInputFiles('#file', photos[0]);
  await count(1);
  for (const [i, photo] of photos.slice(1).entries()) {
    const data = readFileSync(photo).toString('base64');
    await page.evaluate(({ data, name }) => {
      const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
      const files = new DataTransfer();
      files.items.add(new File([bytes], name, { type: 'image/png' }));
      document.dispatchEvent(new DragEvent('drop', { dataTransfer: files, bubbles: true }));
    }, { data, name: `dropped${i}.png` });
    await count(i + 2);
  }
  told.figures = await figures();
  told.texts = await page.evaluate(() => globalThis.texts);
  await type('query', words.query);
  await page.keyboard.press('Enter');
  await waitFor('Compared.');
  told.ranked = await figures();
  await page.keyboard.press('Enter'); // the same texts again
  await waitFor('Compared.');
  told.again = await page.evaluate(() => globalThis.texts);
  told.sigmoids = await page.evaluate(async () => { // of SigLIP
    const { Texts } = await import('./texts.js'), towers = { temperature: 4, bias: -1 };
    const features = [[1, 0], [0.6, 0.8]];
    return Texts.prototype.probabilities.call({ towers }, [0.6, 0.8], { features });
  });
  told.widths = {};
  for (const colorScheme of ['light', 'dark']) {
    for (const width of [375, 1280]) {
      await page.emulateMedia({ colorScheme });
      await page.setViewportSize({ width, height: 800 });
      told.widths[`${width} ${colorScheme}`] = await page.evaluate(() => document.documentElement.scrollWidth);
      if (pictures) await page.screenshot({ path: `${pictures}/${width}-${colorScheme}.png`, fullPage: true });
    }
  }
  await page.click('#camera');
  await page.waitForFunction(() => document.getElementById('video').videoWidth > 0);
  await page.click('#shoot');
  await count(photos.length + 1);
  told.shot = (await figures()).map(figure => figure.name);
}
told.state = await state();
console.log(JSON.stringify(told));
await browser.close();
