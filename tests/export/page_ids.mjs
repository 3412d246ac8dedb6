// Reads what the page's tokenizer.json tells and texts from standard input, writes their token ids.
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const { makeTokenizer } = await import(pathToFileURL(process.argv[2]));
const { told, texts } = JSON.parse(readFileSync(0));
const tokenize = makeTokenizer(told);
process.stdout.write(JSON.stringify(texts.map(text => Array.from(tokenize(text)))));
