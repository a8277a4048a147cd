// Text and token ids, by @huggingface/tokenizers (Apache-2.0; its licence lies beside it); text that arrives token by token.

import { Tokenizer as Library } from "./tokenizers.min.mjs";

const BROKEN = "\ufffd"; // what decoding puts where bytes are no UTF-8 (yet)
const strict = new TextDecoder("utf-8", { fatal: true });
const OVERLAP = 8; // tokens that decoding a continuation looks back on: more than a character of four one-byte tokens

export class Tokenizer {
  constructor(json) {
    this.library = new Library(json, {});
    this.special = new Set();
    for (const [id, token] of this.library.get_added_tokens_decoder()) if (token.special) this.special.add(id);
    this.singles = []; // tokens of one character, with it: what may stand for another in a text
    for (let c = 33; c < 0x600 && this.singles.length < 300; c++) {
      const [id, text] = [this.library.token_to_id(String.fromCharCode(c)), String.fromCharCode(c)];
      if (id !== undefined && this.library.decode([id]) === text) this.singles.push([id, text]);
    }
    this.bytes = new Map(); // tokens <0xNN>, which stand for a byte where the decoder joins them
    for (let value = 0; value < 256; value++) {
      const hex = value.toString(16).padStart(2, "0");
      for (const name of [`<0x${hex.toUpperCase()}>`, `<0x${hex}>`]) {
        const id = this.library.token_to_id(name);
        if (id !== undefined && this.library.decode([id], { skip_special_tokens: false }) !== name) this.bytes.set(id, value);
      }
    }
  }

  /** Token ids of a text; with `special`, between the tokens that the tokenizer puts around a text (such as BOS). */
  encode(text, special = true) {
    return this.library.encode(text, { add_special_tokens: special }).ids;
  }

  /** The text of tokens, special ones left out. */
  decode(tokens) {
    const kept = tokens.filter((t) => this.isText(t));
    const plain = (ids) => (ids.length ? this.library.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false }) : "");
    const broken = this.broken(kept);
    if (!broken.size) return plain(kept);
    // a run of bytes that is no UTF-8 shows as U+FFFD, byte by byte; the library keeps what of it is
    const text = plain(kept.filter((_, i) => !broken.has(i)));
    const stand = this.singles.find(([, c]) => !text.includes(c));
    return plain(kept.map((t, i) => (broken.has(i) ? stand[0] : t))).replaceAll(stand[1], BROKEN);
  }

  /** The places of tokens <0xNN> in runs that are no UTF-8. */
  broken(tokens) {
    const found = new Set();
    if (!this.bytes.size) return found;
    for (let i = 0; i < tokens.length; i++) {
      let end = i;
      while (end < tokens.length && this.bytes.has(tokens[end])) end += 1;
      try {
        strict.decode(Uint8Array.from(tokens.slice(i, end), (t) => this.bytes.get(t)));
      } catch {
        for (let j = i; j < end; j++) found.add(j);
      }
      i = Math.max(i, end - 1);
    }
    return found;
  }

  isText(token) {
    return !this.special.has(token) && this.library.id_to_token(token) !== undefined;
  }

  /** The tokens that the tokenizer puts before and after a text. */
  around() {
    const [bare, whole] = [this.encode("a", false), this.encode("a", true)];
    const at = Math.max(0, whole.findIndex((_, i) => bare.every((t, j) => whole[i + j] === t)));
    return [whole.slice(0, at), whole.slice(at + bare.length)];
  }

  stream(prompt = []) {
    return new TextStream(this, prompt);
  }
}

/** Text of tokens as they come: whole characters only. The same rules as wasat.runtime.tokenizer.TextStream, which says why. */
class TextStream {
  constructor(tokenizer, prompt) {
    this.tokenizer = tokenizer;
    const window = [];
    for (const token of [...prompt].reverse()) {
      if (tokenizer.isText(token)) {
        window.push(token);
        if (window.length >= OVERLAP && !tokenizer.bytes.has(token)) break;
      }
    }
    const end = window.findIndex((t) => !tokenizer.bytes.has(t));
    this.run = this.given = end < 0 ? window.length : end;
    this.window = window.reverse();
    const before = tokenizer.decode(this.window.slice(0, window.length - this.run));
    this.broken = before.endsWith(BROKEN);
    this.shown = before.length - (this.broken ? 1 : 0);
  }

  /** The text that a token completes; empty while a character is incomplete. */
  push(token) {
    const t = this.tokenizer;
    if (!t.isText(token)) return "";
    if (t.bytes.has(token)) {
      this.window.push(token);
      this.run += 1;
      return "";
    }
    if (this.run) this.endRun();
    this.window.push(token);
    const text = t.decode(this.window);
    const held = text.endsWith(BROKEN);
    const piece = this.piece(text, held);
    if (!held) {
      this.window = [token]; // what was new is the context of what follows
      this.shown = t.decode(this.window).length;
    } else if (this.window.length > 2 * OVERLAP) { // bytes that become no character, one after the other
      this.window = this.window.slice(-OVERLAP);
      this.shown = t.decode(this.window).length - 1;
    }
    return piece;
  }

  /** What is left at the end: bytes that never became a character show as U+FFFD. */
  flush() {
    if (this.run) this.endRun();
    return this.piece(this.tokenizer.decode(this.window), false);
  }

  piece(text, held) {
    const end = text.length - (held ? 1 : 0);
    if (this.broken && end > this.shown) {
      if (text[this.shown] === BROKEN) this.shown += 1;
      this.broken = false;
    }
    const piece = text.slice(this.shown, end);
    this.shown = Math.max(this.shown, end);
    return piece;
  }

  endRun() {
    const start = this.window.length - this.run;
    if (this.given) {
      const bytes = Uint8Array.from(this.window.slice(start), (t) => this.tokenizer.bytes.get(t));
      try {
        strict.decode(bytes);
        let whole = this.given; // the prompt's whole characters
        while (whole > 0 && (bytes[whole] & 0xc0) === 0x80) whole -= 1;
        this.shown = this.tokenizer.decode(this.window.slice(0, start + whole)).length;
      } catch {
        this.shown = this.tokenizer.decode(this.window.slice(0, start)).length + this.given;
      }
    }
    this.run = this.given = 0;
  }
}
