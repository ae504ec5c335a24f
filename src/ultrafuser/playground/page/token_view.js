/**
 * The tokens of one answer as elements: prose with its line breaks, fenced code in `<pre>`, one `<span>` per token.
 *
 * A token with a line break inside becomes several spans, so that a line is never half prose, half code. Long answers
 * are cut into chunks of lines that the browser lays out on their own and skips while they are out of sight.
 */

import { tokenClasses } from "./colours.js";
import { copyButton, element } from "./dom.js";

const CHUNK_SPANS = 120; // a chunk ends at the next line break after so many spans
const MAX_SINGLE = 6000; // after so many tokens, neighbours with one leader share a span
const MAX_JOINED = 32;
const FENCE = /^ {0,3}(`{3,}|~{3,})(.*)/s;

export class TokenView {
  constructor(root) {
    this.root = root;
    this.spans = []; // the spans of every token
    this.shown = Number.POSITIVE_INFINITY; // how many tokens the play-back shows
    this.line = ""; // the text of the current line
    this.lineSpans = [];
    this.fence = null; // the open code block: {mark, code, isOpening}
    this.chunk = null; // where spans go
  }

  /** Add a token at the end. */
  append(token) {
    const index = this.spans.length;
    this.spans.push([]);
    for (const piece of token.text.match(/[^\n]*\n|[^\n]+$/g) ?? [""]) this.addPiece(piece, token, index);
  }

  addPiece(piece, token, index) {
    this.chunk ??= this.newChunk();
    const classes = tokenClasses(token.weights) + (piece === "\n" ? " newline" : "");
    const last = this.lineSpans.at(-1);
    if (index >= MAX_SINGLE && last?.classList[1] === classes.split(" ")[1] && index - last.dataset.i < MAX_JOINED) {
      last.firstChild.appendData(piece);
      last.joined = index - last.dataset.i + 1;
      this.spans[index].push(last);
    } else {
      const span = element("span", { className: classes });
      span.dataset.i = index;
      span.append(piece);
      this.chunk.append(span);
      this.spans[index].push(span);
      this.lineSpans.push(span);
    }
    this.line += piece;
    if (this.fence === null && FENCE.test(this.line)) this.openCode();
    if (piece.endsWith("\n")) this.endLine();
  }

  newChunk() {
    const chunk = element("span", { className: "chunk" });
    if (this.fence) this.fence.code.append(chunk);
    else this.root.append(element("div", { className: "prose" }, chunk));
    return chunk;
  }

  /** The current line turned out to open a code block: it moves into one. */
  openCode() {
    const old = this.chunk;
    const code = element("code");
    const bar = element("div", { className: "code-bar" }, element("span"), copyButton("Copy", () => bareCode(code)));
    this.root.append(element("div", { className: "code" }, bar, element("pre", { tabIndex: 0 }, code)));
    this.fence = { code, bar, mark: "", isOpening: true };
    this.chunk = this.newChunk();
    for (const span of this.lineSpans) span.classList.add("fence");
    this.chunk.append(...this.lineSpans);
    if (!old.hasChildNodes()) old.parentElement.remove();
  }

  endLine() {
    if (this.fence?.isOpening) this.endOpening();
    else if (this.fence && this.isClosing()) {
      for (const span of this.lineSpans) span.classList.add("fence");
      this.fence = null;
      this.chunk = null;
    } else if (this.chunk.childElementCount >= CHUNK_SPANS) this.chunk = null;
    this.line = "";
    this.lineSpans = [];
  }

  endOpening() {
    const [, mark, info] = FENCE.exec(this.line);
    if (mark[0] === "`" && info.includes("`")) { // code within a line of prose, as in ```x``` is it
      const block = this.fence.code.closest(".code");
      for (const span of this.lineSpans) span.classList.remove("fence");
      this.fence = null;
      block.replaceWith(element("div", { className: "prose" }, this.chunk));
      return;
    }
    this.fence.mark = mark;
    this.fence.isOpening = false;
    this.fence.bar.firstChild.textContent = info.trim().split(/\s/)[0];
    for (const span of this.lineSpans) span.classList.add("fence");
  }

  isClosing() {
    const match = FENCE.exec(this.line);
    return match && match[1][0] === this.fence.mark[0] && match[1].length >= this.fence.mark.length && !match[2].trim();
  }

  /** No more tokens come: a last line without a line break may close the code. */
  finish() {
    if (this.fence && !this.fence.isOpening && this.isClosing()) {
      for (const span of this.lineSpans) span.classList.add("fence");
    }
  }

  /** Show the first `count` tokens and dim the others. Only tokens between the old and the new count are touched. */
  show(count) {
    const before = Math.min(this.shown, this.spans.length);
    const [start, end] = count < before ? [count, before] : [before, Math.min(count, this.spans.length)];
    for (let i = start; i < end; i++) for (const span of this.spans[i]) span.classList.toggle("later", i >= count);
    this.shown = count;
  }
}

/** The text of a code block without the lines of its fence. */
function bareCode(code) {
  return [...code.querySelectorAll(".t:not(.fence)")].map((span) => span.textContent).join("");
}
