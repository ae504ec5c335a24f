/** The controls beside the chat. Their values stay in the browser from visit to visit. */

import { byId } from "./dom.js";

const STORED = "ultrafuser-settings";

export class Settings {
  /** @param {() => void} changed called after a change of the display */
  constructor(changed) {
    this.form = byId("settings-form");
    this.panel = byId("settings");
    this.opener = byId("open-settings");
    this.restore();
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => {
      this.showValues();
      localStorage.setItem(STORED, JSON.stringify(this.values));
      changed();
    });
    this.opener.addEventListener("click", () => this.toggle(!this.panel.classList.contains("open")));
    byId("close-settings").addEventListener("click", () => this.toggle(false));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.panel.classList.contains("open")) this.toggle(false);
    });
    this.showValues();
  }

  toggle(open) {
    this.panel.classList.toggle("open", open);
    this.opener.setAttribute("aria-expanded", open);
    if (open) this.form.elements.system.focus();
    else this.opener.focus();
  }

  get values() {
    return Object.fromEntries(
      [...this.form.elements].filter((field) => field.name).map((field) => [
        field.name,
        field.type === "checkbox" ? field.checked : field.value,
      ]),
    );
  }

  restore() {
    let stored = {};
    try {
      stored = JSON.parse(localStorage.getItem(STORED)) ?? {};
    } catch {
      // written by another version
    }
    for (const [name, value] of Object.entries(stored)) {
      const field = this.form.elements[name];
      if (field?.type === "checkbox") field.checked = value === true;
      else if (field) field.value = value;
    }
  }

  showValues() {
    for (const output of this.form.querySelectorAll("output")) {
      output.textContent = Number(this.form.elements[output.htmlFor.value].value).toFixed(2);
    }
  }

  /** Whether all values are valid. If not, the panel opens and says which is not. */
  check() {
    if (this.form.checkValidity()) return true;
    this.toggle(true);
    return this.form.reportValidity();
  }

  /** A model with a short context: leave half of it for the question. */
  limitTokens(contextLength) {
    const field = this.form.elements.max_tokens;
    field.max = contextLength;
    if (Number(field.value) >= contextLength) field.value = Math.floor(contextLength / 2);
  }

  /** Fields of a request. */
  get sampling() {
    const { temperature, top_p, max_tokens, seed } = this.values;
    const fields = { temperature: Number(temperature), top_p: Number(top_p) };
    if (Number(max_tokens) >= 1) fields.max_tokens = Math.floor(Number(max_tokens));
    if (seed !== "") fields.seed = Math.floor(Number(seed));
    return fields;
  }
}
