/** Whether the server is there: a banner when it is lost, and a look every second until it is back. */

import { isHealthy } from "./api.js";
import { announce, byId } from "./dom.js";

const RETRY_MS = 1000;
const CHECK_MS = 15_000;
const GOODBYE_MS = 3000;

export class Connection {
  /** @param {() => Promise<void>} onReturn called when a lost server is back */
  constructor(onReturn) {
    this.banner = byId("banner");
    this.isLost = false;
    this.onReturn = onReturn;
    setInterval(() => {
      if (document.visibilityState === "visible" && !this.isLost) this.check();
    }, CHECK_MS);
  }

  async check() {
    if (!(await isHealthy())) this.lost("The server cannot be reached.");
  }

  /** Show the banner, and ask until the server answers. */
  async lost(reason) {
    if (this.isLost) return;
    this.isLost = true;
    this.show("bad", `${reason} Reconnecting…`);
    while (!(await isHealthy())) await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    this.isLost = false;
    this.show("good", "The server is back.");
    announce("The server is back.");
    setTimeout(() => {
      if (!this.isLost) this.banner.hidden = true;
    }, GOODBYE_MS);
    await this.onReturn();
  }

  show(kind, text) {
    this.banner.className = `banner ${kind}`;
    this.banner.textContent = text;
    this.banner.hidden = false;
  }
}
