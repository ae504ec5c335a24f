/** Play-back of an answer: a slider over a ribbon of the gate's weights, and a button that plays the generation again. */

import { element } from "./dom.js";
import { tokenDetails } from "./token_card.js";
import { meanWeights } from "./weights.js";

const TOKENS_PER_S = 24;
const LONGEST_S = 20; // long answers play faster
const RIBBON_HEIGHT = 28;

export class Playback {
  constructor(answer) {
    this.answer = answer;
    this.timer = null;
    this.button = element("button", { type: "button", className: "play", "aria-label": "Play the generation" }, "▶");
    this.slider = element("input", { type: "range", min: 0, step: 1, "aria-label": "Token of the generation" });
    this.ribbon = element("canvas", { height: RIBBON_HEIGHT, "aria-hidden": "true" });
    this.position = element("output", { className: "position" });
    this.now = element("div", { className: "now", hidden: true });
    this.track = element("div", { className: "track" }, this.ribbon, this.slider);
    this.root = element(
      "div",
      { className: "playback", hidden: true },
      element("div", { className: "playback-row" }, this.button, this.track, this.position),
      this.now,
    );
    this.button.addEventListener("click", () => (this.timer === null ? this.play() : this.pause()));
    this.slider.addEventListener("input", () => {
      this.pause();
      this.moveTo(this.slider.valueAsNumber);
    });
    new ResizeObserver(() => this.draw()).observe(this.track);
  }

  /** Called when the answer is complete. */
  open() {
    const count = this.answer.tokens.length;
    this.root.hidden = count === 0;
    this.slider.max = count;
    this.moveTo(count);
    this.draw();
  }

  play() {
    const count = this.answer.tokens.length;
    const rate = Math.max(TOKENS_PER_S, count / LONGEST_S);
    const start = this.slider.valueAsNumber >= count ? 0 : this.slider.valueAsNumber;
    const began = performance.now();
    this.button.textContent = "❚❚";
    this.button.setAttribute("aria-label", "Pause the play-back");
    const step = (time) => {
      const position = Math.min(count, start + Math.max(0, Math.floor(((time - began) / 1000) * rate)));
      this.moveTo(position);
      if (position < count) this.timer = requestAnimationFrame(step);
      else this.pause();
    };
    this.timer = requestAnimationFrame(step);
  }

  pause() {
    if (this.timer !== null) cancelAnimationFrame(this.timer);
    this.timer = null;
    this.button.textContent = "▶";
    this.button.setAttribute("aria-label", "Play the generation");
  }

  /** Show the answer as it was after `count` tokens. */
  moveTo(count) {
    const { tokens, view } = this.answer;
    this.slider.value = count;
    this.slider.setAttribute("aria-valuetext", `${count} of ${tokens.length} tokens`);
    this.position.textContent = `${count} / ${tokens.length}`;
    view.show(count);
    const isInside = count > 0 && count < tokens.length && tokens[count - 1].weights;
    const opens = isInside && this.now.hidden;
    this.now.hidden = !isInside;
    if (isInside) this.now.replaceChildren(...tokenDetails(this.answer, count - 1));
    if (opens) this.root.scrollIntoView({ block: "nearest" });
  }

  /** The ribbon: for each pixel column the mean weights of its tokens, stacked. */
  draw() {
    const { tokens, specialists } = this.answer;
    const width = Math.round(this.track.clientWidth * devicePixelRatio);
    if (width === 0 || tokens.length === 0 || specialists.length === 0) return;
    this.ribbon.width = width;
    this.ribbon.height = Math.round(RIBBON_HEIGHT * devicePixelRatio);
    const brush = this.ribbon.getContext("2d");
    const colours = specialists.map((_, k) => colourOf(this.root, k));
    const columns = Math.min(width, tokens.length);
    for (let column = 0; column < columns; column++) {
      const first = Math.floor((column * tokens.length) / columns);
      const means = meanWeights(tokens.slice(first, Math.floor(((column + 1) * tokens.length) / columns)), specialists);
      const left = Math.floor((column * width) / columns);
      const right = Math.floor(((column + 1) * width) / columns);
      let top = 0;
      means.forEach((mean, k) => {
        const height = mean * this.ribbon.height;
        brush.fillStyle = colours[k];
        brush.fillRect(left, top, right - left, height);
        top += height;
      });
    }
  }
}

function colourOf(root, k) {
  const sample = element("i", { className: `c${k}` });
  root.append(sample);
  const colour = getComputedStyle(sample).getPropertyValue("--c").trim();
  sample.remove();
  return colour || "#888888";
}
