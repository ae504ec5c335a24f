/**
 * The card of one token: the weights as bars, and each specialist's most likely tokens.
 *
 * One card serves the page. It listens on the list of turns, not on tokens, so that a long answer costs nothing.
 */

import { announce, byId, element, visible } from "./dom.js";
import { leader, meanWeights } from "./weights.js";

const GAP_PX = 8;
const PAGE_TOKENS = 20; // Page Up and Page Down

export class TokenCard {
  /** @param {(element: Element) => Answer} answerOf the answer that an element belongs to */
  constructor(root, answerOf) {
    this.card = byId("token-card");
    this.answerOf = answerOf;
    this.active = null; // the span that is marked
    this.cursor = null; // where the arrow keys are: {tokens, index, count}
    root.addEventListener("pointerover", (event) => event.pointerType === "mouse" && this.point(event));
    root.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.hide());
    root.addEventListener("keydown", (event) => this.walk(event));
    root.addEventListener("focusout", () => {
      this.cursor = null;
      this.hide();
    });
    document.addEventListener("click", (event) => this.tap(event));
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
    addEventListener("scroll", () => this.hide(), { passive: true, capture: true });
  }

  point(event) {
    const span = event.target.closest(".t");
    if (span) this.show(span);
    else this.hide();
  }

  tap(event) {
    const span = event.target.closest(".tokens .t");
    if (span) this.show(span);
    else if (!event.target.closest(".token-card")) this.hide();
  }

  walk(event) {
    const tokens = event.target.closest(".tokens");
    if (!tokens || event.target !== tokens || event.ctrlKey || event.altKey || event.metaKey) return;
    const answer = this.answerOf(tokens);
    const count = answer.tokens.length;
    const cursor = this.cursor?.tokens === tokens ? this.cursor : { index: -1, count: 1 };
    const current = cursor.index;
    const targets = {
      ArrowRight: current + cursor.count,
      ArrowLeft: current < 0 ? count - 1 : current - 1,
      Home: 0,
      End: count - 1,
      PageDown: current + PAGE_TOKENS,
      PageUp: current - PAGE_TOKENS,
    };
    if (!(event.key in targets) || count === 0) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(count - 1, targets[event.key]));
    const [span] = answer.view.spans[index];
    this.cursor = { tokens, index: Number(span.dataset.i), count: span.joined ?? 1 };
    span.scrollIntoView({ block: "nearest" });
    const show = () => this.cursor?.index === Number(span.dataset.i) && this.show(span);
    requestAnimationFrame(() => requestAnimationFrame(show)); // after the scrolling, which hides the card
    announce(answer.describe(index));
  }

  show(span) {
    const answer = this.answerOf(span);
    const index = Number(span.dataset.i);
    if (!answer?.tokens[index]?.weights) {
      this.hide();
      return;
    }
    this.mark(span);
    this.card.replaceChildren(...tokenDetails(answer, index, span.joined));
    this.card.hidden = false;
    this.place(span);
  }

  /** Below the token, or above it where there is no room. */
  place(span) {
    const target = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { width, height } = this.card.getBoundingClientRect();
    const left = Math.min(Math.max(GAP_PX, target.left), innerWidth - width - GAP_PX);
    const below = target.bottom + GAP_PX;
    const top = below + height > innerHeight ? Math.max(GAP_PX, target.top - height - GAP_PX) : below;
    this.card.style.left = `${left}px`;
    this.card.style.top = `${top}px`;
  }

  mark(span) {
    this.active?.classList.remove("active");
    this.active = span;
    span?.classList.add("active");
  }

  hide() {
    this.card.hidden = true;
    this.mark(null);
  }
}

/** A token with its weights and candidates, for the card and for the play-back. Of `count` joined tokens: the mean. */
export function tokenDetails(answer, index, count = 1) {
  const tokens = answer.tokens.slice(index, index + count);
  const text = tokens.map((token) => token.text).join("");
  const weights = meanWeights(tokens, answer.specialists);
  const top = count === 1 ? tokens[0].top : null;
  const place = count === 1 ? `token ${index + 1}` : `mean of tokens ${index + 1} to ${index + count}`;
  const head = element(
    "div",
    { className: "token-head" },
    element("b", {}, visible(text)),
    element("small", {}, `${place} of ${answer.tokens.length}`),
  );
  const ahead = leader(weights).index;
  const rows = answer.specialists.map((name, k) => weightRow(name, k, weights[k], k === ahead, top?.[k] ?? []));
  return [head, element("div", { className: "weights" }, ...rows)];
}

function weightRow(name, k, weight, leads, candidates) {
  const bar = element("i", { className: `c${k}` });
  bar.style.width = `${(100 * weight).toFixed(1)}%`;
  const tops = candidates.map(({ token, logprob }) =>
    element("span", {}, element("code", {}, visible(token)), element("small", {}, Math.exp(logprob).toFixed(2))),
  );
  return element(
    "div",
    { className: leads ? "weight leads" : "weight" },
    element("span", { className: "name" }, name),
    element("span", { className: "bar" }, bar),
    element("span", { className: "value" }, weight.toFixed(3)),
    element("span", { className: "tops" }, ...tops),
  );
}
