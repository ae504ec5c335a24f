/** The turns of a conversation: a question and one answer, or two side by side. */

import { Answer } from "./answer.js";
import { postJson } from "./api.js";
import { announce, byId, download, element } from "./dom.js";

export class Conversation {
  /**
   * @param targets () => who answers now, one or two
   * @param request (target) => the fields of a request besides the messages
   * @param {(error: ServerError) => void} failed
   */
  constructor({ targets, request, system, failed, running }) {
    Object.assign(this, { targets, request, system, failed, running });
    this.root = byId("turns");
    this.turns = [];
    this.abort = null;
    this.root.addEventListener("grow", () => this.follow());
    addEventListener("scroll", () => (this.follows = isAtEnd()), { passive: true });
  }

  /** Ask, and wait for all answers. */
  async ask(question) {
    byId("welcome").hidden = true;
    const targets = this.targets();
    const answers = targets.map((target) => new Answer(target));
    const turn = { question, answers, root: null };
    turn.root = element(
      "section",
      { className: "turn" },
      element("div", { className: "question" }, element("h2", { className: "hidden" }, "Question"), element("p", {}, question)),
      element("div", { className: `answers of-${answers.length}` }, ...answers.map((answer) => answer.root)),
    );
    for (const answer of answers) answer.retry.addEventListener("click", () => this.run(turn));
    this.turns.push(turn);
    this.root.append(turn.root);
    this.follows = true;
    this.follow();
    await this.run(turn);
  }

  /** Request the answers of a turn, again if it has some. */
  async run(turn) {
    if (this.abort) return;
    this.abort = new AbortController();
    this.running(true);
    const { signal } = this.abort;
    const errors = await Promise.all(
      turn.answers.map((answer, side) =>
        answer.run({ ...this.request(answer.target), messages: this.messages(turn, side) }, signal),
      ),
    );
    this.abort = null;
    this.running(false);
    announce(turn.answers.map((answer) => answer.summary()).join(" "));
    this.follow();
    const error = errors.find((problem) => problem);
    if (error) this.failed(error);
  }

  stop() {
    this.abort?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.root.replaceChildren();
    byId("welcome").hidden = false;
  }

  /** The messages before an answer. Each side of a comparison reads its own earlier answers. */
  messages(turn, side) {
    const system = this.system();
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const earlier of this.turns.slice(0, this.turns.indexOf(turn))) {
      const text = (earlier.answers[side] ?? earlier.answers[0]).text;
      if (text === "") continue;
      messages.push({ role: "user", content: earlier.question }, { role: "assistant", content: text });
    }
    return [...messages, { role: "user", content: turn.question }];
  }

  /** Stay at the end while an answer grows, unless the reader scrolled up. */
  follow() {
    if (this.follows) scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
  }

  toJson() {
    return {
      system: this.system(),
      turns: this.turns.map(({ question, answers }) => ({ question, answers: answers.map((answer) => answer.toJson()) })),
    };
  }

  exportJson(settings) {
    const text = JSON.stringify({ ...this.toJson(), settings }, null, 2);
    download(new Blob([text], { type: "application/json" }), "conversation.json");
  }

  /** The page of `ultrafuser inspect` with every answer. The server writes it. */
  async exportHtml() {
    const turns = this.turns.map(({ question, answers }) => ({
      question,
      answers: answers.map(({ target, specialists, tokens }) => ({
        label: target.label,
        specialists,
        tokens: tokens.map((token) => token.text),
        weights: tokens.every((token) => token.weights) ? tokens.map((token) => token.weights) : [],
      })),
    }));
    const response = await postJson("playground/export", { title: "Conversation", turns });
    download(await response.blob(), "conversation.html");
  }
}

function isAtEnd() {
  return innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
}
