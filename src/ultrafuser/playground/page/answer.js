/** One answer of one model: it streams, shows its tokens and shares, and can be stopped, copied and played again. */

import { ServerError, streamChat } from "./api.js";
import { copyButton, element, percent } from "./dom.js";
import { Playback } from "./playback.js";
import { TokenView } from "./token_view.js";
import { leader, meanWeights } from "./weights.js";

const SLOW_FLUSH_TOKENS = 2500; // from here on new tokens are shown ten times a second, not at every frame
const SLOW_FLUSH_MS = 100;

export class Answer {
  /**
   * @param target `{label, base, model, specialists}`: who answers. `specialists` are the names for the weights.
   */
  constructor(target) {
    this.target = target;
    this.specialists = target.specialists;
    this.title = element("h3", {}, target.label);
    this.state = element("span", { className: "state" });
    this.text_root = element("div", { className: "tokens", tabIndex: 0, role: "group" });
    this.problem = element("p", { className: "problem", role: "alert", hidden: true });
    this.shares = element("div", { className: "shares", hidden: true });
    this.figures = element("span", { className: "figures" });
    this.retry = element("button", { type: "button", className: "quiet retry" }, "Retry");
    this.playback = new Playback(this);
    const actions = element("div", { className: "actions" }, copyButton("Copy", () => this.text), this.retry, this.figures);
    this.root = element(
      "article",
      { className: "answer" },
      element("header", {}, this.title, this.state),
      this.text_root,
      this.problem,
      this.shares,
      this.playback.root,
      actions,
    );
    this.root.answer = this;
    this.reset();
  }

  reset() {
    this.tokens = [];
    this.queue = [];
    this.usage = null;
    this.finishReason = null;
    this.error = null;
    this.text_root.replaceChildren();
    this.view = new TokenView(this.text_root);
    this.problem.hidden = this.shares.hidden = this.playback.root.hidden = true;
    this.playback.pause();
    this.figures.textContent = "";
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  /** Request the answer and show it as it comes. An error is shown and returned, never thrown. */
  async run(body, signal) {
    this.reset();
    this.root.setAttribute("aria-busy", "true");
    this.state.textContent = "reads the prompt";
    this.began = performance.now();
    this.first = null;
    try {
      await this.receive(body, signal);
    } catch (error) {
      if (error.name === "AbortError") this.finishReason = "stopped";
      else if (error instanceof ServerError) this.error = error;
      else throw error;
    } finally {
      this.finish();
    }
    return this.error;
  }

  async receive(body, signal) {
    try {
      await this.readChunks(body, signal);
    } catch (error) {
      // An engine without the candidates of each specialist says so. The weights alone are fine.
      if (error.param !== "specialist_logprobs" || this.tokens.length > 0) throw error;
      const { specialist_logprobs: _, ...rest } = body;
      await this.readChunks(rest, signal);
    }
  }

  async readChunks(body, signal) {
    for await (const chunk of streamChat(this.target.base, body, signal)) {
      if (chunk.tokens.length > 0) this.add(chunk.tokens);
      this.usage = chunk.usage ?? this.usage;
      this.finishReason = chunk.finishReason ?? this.finishReason;
    }
  }

  add(tokens) {
    this.first ??= performance.now();
    this.tokens.push(...tokens);
    this.queue.push(...tokens);
    if (this.scheduled) return;
    this.scheduled = true;
    const flush = () => requestAnimationFrame(() => this.flush());
    if (this.tokens.length > SLOW_FLUSH_TOKENS) setTimeout(flush, SLOW_FLUSH_MS);
    else flush();
  }

  flush() {
    this.scheduled = false;
    for (const token of this.queue) this.view.append(token);
    this.queue = [];
    this.state.textContent = this.root.getAttribute("aria-busy") === "true" ? `${this.tokens.length} tokens` : "";
    this.root.dispatchEvent(new CustomEvent("grow", { bubbles: true }));
  }

  finish() {
    this.root.removeAttribute("aria-busy");
    this.flush();
    this.view.finish();
    this.finished = performance.now();
    this.state.textContent = { length: "cut at the largest number of tokens", stopped: "stopped" }[this.finishReason] ?? "";
    if (this.error) {
      this.problem.textContent = `${this.error.message}${this.tokens.length ? " This is the part that arrived." : ""}`;
      this.problem.hidden = false;
      if (this.tokens.length) this.state.textContent = "incomplete";
    }
    this.text_root.setAttribute("aria-label", `${this.title.textContent}: ${this.tokens.length} tokens. Walk with the arrow keys.`);
    this.showShares();
    this.showFigures();
    this.playback.open();
  }

  /** Each specialist's share of the answer: from the server, or the mean of the weights that arrived. */
  get shareOf() {
    const given = this.usage?.specialist_shares;
    const means = meanWeights(this.tokens, this.specialists);
    return Object.fromEntries(this.specialists.map((name, k) => [name, given?.[name] ?? means[k]]));
  }

  showShares() {
    const hasWeights = this.usage?.specialist_shares || this.tokens.some((token) => token.weights);
    this.shares.hidden = !hasWeights || this.specialists.length === 0;
    const bar = element("div", { className: "share-bar", "aria-hidden": "true" });
    const list = element("ul", { "aria-label": "Shares of the specialists" });
    Object.entries(this.shareOf).forEach(([name, share], k) => {
      const part = element("i", { className: `c${k}` });
      part.style.width = `${100 * share}%`;
      bar.append(part);
      const className = share === 0 ? "none" : "";
      list.append(element("li", { className }, element("i", { className: `c${k}` }), name, element("b", {}, percent(share))));
    });
    this.shares.replaceChildren(bar, list);
  }

  showFigures() {
    if (this.first === null) return;
    const count = this.usage?.completion_tokens ?? this.tokens.length;
    const seconds = (this.finished - this.first) / 1000;
    const rate = count > 1 && seconds > 0 ? `, ${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
    this.figures.textContent = `${count} tokens${rate}, first after ${((this.first - this.began) / 1000).toFixed(2)} s`;
  }

  /** A token in words, for screen readers. */
  describe(index) {
    const { text, weights } = this.tokens[index];
    if (!weights) return text;
    const lead = leader(weights).index;
    const shares = this.specialists.map((name, k) => `${name} ${percent(weights[k])}`);
    return `${JSON.stringify(text)}: ${this.specialists[lead]} leads. ${shares.join(", ")}`;
  }

  /** The answer in one sentence, for screen readers. */
  summary() {
    const shares = Object.entries(this.shareOf).map(([name, share]) => `${name} ${percent(share)}`);
    const end = this.error ? `failed: ${this.error.message}` : "is complete";
    return `The answer of ${this.target.label} ${end}. ${this.tokens.length} tokens. ${shares.join(", ")}`;
  }

  toJson() {
    return {
      label: this.target.label,
      model: this.target.model,
      specialists: this.specialists,
      text: this.text,
      tokens: this.tokens,
      usage: this.usage,
      finish_reason: this.finishReason,
      error: this.error?.message ?? null,
    };
  }
}
