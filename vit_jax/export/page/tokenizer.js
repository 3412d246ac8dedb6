// From a text to the token ids that a text tower reads: the rules of vit_jax.data.text. The models of
// word pieces, byte pairs and SentencePiece are those of Hugging Face's tokenizers.

import { Tokenizer } from './tokenizers.min.mjs';

const PREPARE = { bert: bertWords, sentencepiece: (text, how) => [sentencePiece(text, how)], json: whole };
const LONGEST_WORD = 100; // bytes, of BERT
const PUNCTUATION = /[!-/:-@[-`{-~]/g;
const BLANKS = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/; // Python's

// told: the content of tokenizer.json, see vit_jax/export/page_tokenizer.py.
// Returns a function of a text that gives an Int32Array of the length that the model takes.
export function makeTokenizer(told) {
  const tokenizer = new Tokenizer(told.tokenizer, {});
  const { max_len: length, front, back, pad, pad_left: left } = told.settings;
  const charsmap = told.settings.charsmap && readCharsmap(told.settings.charsmap);
  const how = { ...told.settings, charsmap };
  return text => {
    const room = length - front.length - back.length, ids = [];
    for (const word of PREPARE[how.kind](text, how)) {
      if (word === null) ids.push(how.unknown);
      else ids.push(...tokenizer.encode(word, { add_special_tokens: false }).ids);
      if (ids.length >= room) break;
    }
    const row = [...front, ...ids.slice(0, room), ...back];
    const filler = Array(length - row.length).fill(pad);
    const filled = left ? [...filler, ...row] : [...row, ...filler];
    return Int32Array.from(filled, id => (id === how.blank ? 0 : id));
  };
}

// Lower case, a space for _, no other ASCII punctuation, single spaces: as SigLIP's texts are.
function canonical(text) {
  return text.toLowerCase().replaceAll('_', ' ').replace(PUNCTUATION, '').split(BLANKS).filter(Boolean).join(' ');
}

function whole(text, how) {
  if (how.canonical) text = canonical(text);
  else if (how.lower) text = text.toLowerCase();
  // JavaScript's lower case knows the end of a word, that of the tokenizer does not.
  return [how.lowercases ? text.replaceAll('\u03a3', '\u03c3') : text];
}

// --- BERT: folded, without marks, split at spaces and punctuation. null is an unknown word.

const IGNORED = /\p{Default_Ignorable_Code_Point}/gu;
const ALONE = /^[!-/:-@[-`{-~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{2a6df}\u{2a700}-\u{2ceaf}\u{2f800}-\u{2fa1f}\p{P}]$/u;
const SEPARATOR = /^[\p{Cc}\p{Cf} ]$/u;
const MARK = /^\p{Mn}$/u;
const encoder = new TextEncoder();

function bertWords(text, how) {
  const words = [''];
  for (const character of fold(text, how).normalize('NFD')) {
    if (MARK.test(character)) continue;
    if (SEPARATOR.test(character)) words.push('');
    else if (ALONE.test(character)) words.push(character, '');
    else words[words.length - 1] += character;
  }
  return words.filter(word => word)
    .map(word => (encoder.encode(word).length > LONGEST_WORD ? null : word));
}

function fold(text, how) { // Unicode's NFKC_Casefold
  let folded = text.normalize('NFD');
  for (;;) {
    const cased = Array.from(folded, c => how.casefold[c] ?? c.toLowerCase()).join('');
    const once = cased.replace(IGNORED, '').normalize('NFKC');
    if (once === folded) return once;
    folded = once;
  }
}

// --- SentencePiece: replacements of its model, then single spaces, written as its own sign.

const SPACE = '\u2581';

function sentencePiece(text, how) {
  if (how.canonical) text = canonical(text);
  let out = how.charsmap ? replace(text, how.charsmap) : text;
  if (how.collapse) out = out.replace(/ +/g, ' ').replace(/^ | $/g, '');
  if (!out) return '';
  return (how.prefix ? SPACE : '') + out.replaceAll(' ', SPACE);
}

// The table of replacements: a double array (https://github.com/s-yata/darts-clone) of what is
// replaced, in UTF-8, whose values are places among the texts behind it, each ended by a zero.
function readCharsmap(base64) {
  const bytes = Uint8Array.from(atob(base64), character => character.charCodeAt(0));
  const size = new DataView(bytes.buffer).getUint32(0, true);
  return { units: new Uint32Array(bytes.slice(4, 4 + size).buffer), texts: bytes.subarray(4 + size) };
}

function replace(text, { units, texts }) { // the longest that fits first
  const bytes = encoder.encode(text), out = [];
  const offset = unit => (unit >>> 10) << ((unit & 0x200) >>> 6);
  for (let i = 0; i < bytes.length;) {
    let place = offset(units[0]), found = -1, end = i + 1;
    for (let j = i; j < bytes.length; j++) {
      place ^= bytes[j];
      const unit = units[place];
      if (((unit & 0x800000ff) >>> 0) !== bytes[j]) break;
      place ^= offset(unit);
      if (unit >>> 8 & 1) {
        found = units[place] & 0x7fffffff;
        end = j + 1;
      }
    }
    if (found < 0) {
      while (end < bytes.length && (bytes[end] & 0xc0) === 0x80) end++; // to the next character
      out.push(...bytes.subarray(i, end));
    } else {
      for (let k = found; texts[k]; k++) out.push(texts[k]);
    }
    i = end;
  }
  return new TextDecoder('utf-8', { ignoreBOM: true }).decode(Uint8Array.from(out));
}
