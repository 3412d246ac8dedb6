// Texts of a two-tower model: classes and searches in words, each text computed once.

import { makeTokenizer } from './tokenizer.js';

export class Texts {
  // about: of model.json; run: computes a model, see app.js.
  constructor(about, run) {
    this.towers = about.towers;
    this.run = run;
    this.known = new Map(); // text -> promise of its features
    this.tokenizer = fetch('tokenizer.json').then(async response => makeTokenizer(await response.json()));
    this.tokenizer.catch(() => {}); // who asks for it is told
  }

  // Features of a text, Float32Array of length 1.
  features(text) {
    if (!this.known.has(text)) {
      const found = this.compute(text);
      found.catch(() => this.known.delete(text));
      this.known.set(text, found);
    }
    return this.known.get(text);
  }

  async compute(text) {
    const tokens = (await this.tokenizer)(text);
    const { outputs } = await this.run('text', {
      tokens: { type: 'int32', data: tokens, dims: [1, tokens.length] },
    });
    return outputs.features.data;
  }

  // What classes are compared with: {names, features}.
  //   tell: called with how many texts are done, and of how many.
  async classes(names, prompt, tell) {
    const features = [];
    for (const [i, name] of names.entries()) {
      tell(i, names.length);
      features.push(await this.features(prompt.replaceAll('{}', name)));
    }
    return { names, features };
  }

  // Of a photo with these features the probabilities of classes: a softmax, or with a bias (SigLIP)
  // a sigmoid of each.
  probabilities(photo, { features }) {
    const { temperature, bias } = this.towers;
    const logits = features.map(text => temperature * dot(photo, text) + (bias ?? 0));
    if (bias !== null) return logits.map(x => 1 / (1 + Math.exp(-x)));
    const most = Math.max(...logits), powers = logits.map(x => Math.exp(x - most));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map(x => x / sum);
  }
}

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}
