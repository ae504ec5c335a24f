/** The page: finds out what is served, and connects the controls with the conversation. */

import { getJson, getModels, hasKey, ServerError, setKey } from "./api.js";
import { isDark, paint } from "./colours.js";
import { Connection } from "./connection.js";
import { Conversation } from "./conversation.js";
import { byId, element } from "./dom.js";
import { Settings } from "./settings.js";
import { TokenCard } from "./token_card.js";

const CANDIDATES = 3; // most likely tokens of each specialist, per token
const THEME = "ultrafuser-theme";

const server = { models: [], model: null, switchedOff: new Set(), others: [], palette: null };
const settings = new Settings(restyle);
const connection = new Connection(connect);
const conversation = new Conversation({
  targets,
  request,
  system: () => settings.values.system.trim(),
  failed,
  running: (is) => {
    byId("send").hidden = is;
    byId("stop").hidden = !is;
    document.body.classList.toggle("running", is);
    if (!is && !matchMedia("(pointer: coarse)").matches) byId("message").focus();
  },
});
new TokenCard(byId("turns"), (node) => node.closest(".answer")?.answer);

// ---------------------------------------------------------------- what is served

async function connect() {
  try {
    const config = await getJson("playground/config.json");
    server.palette = config.palette;
    showExamples(config.examples);
    server.models = await getModels("");
    server.others = (await Promise.all(config.others.map(otherModels))).flat();
    byId("key-form").hidden = true;
    server.model = server.models.find((model) => model.id === server.model?.id) ?? server.models[0] ?? null;
    showModel();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    failed(error);
  }
}

/** The models of a compared server. One that cannot be reached is listed, and cannot be chosen. */
async function otherModels(name) {
  const base = `playground/others/${encodeURIComponent(name)}/`;
  try {
    const models = await getModels(base);
    return models.map((model) => ({ base, ...model, label: models.length > 1 ? `${name}: ${model.id}` : name }));
  } catch {
    return [{ base, id: null, label: `${name} (not reachable)` }];
  }
}

function failed(error) {
  if (error.kind === "lost") connection.lost(error.message);
  if (error.kind !== "key") return;
  byId("key-form").hidden = false;
  byId("key-problem").hidden = !hasKey();
  byId("key-problem").textContent = hasKey() ? `The server refused this key: ${error.message}` : "";
  byId("key").focus();
}

function showModel() {
  const { model, models } = server;
  const choice = byId("model");
  choice.replaceChildren(...models.map(({ id }) => element("option", { value: id, selected: id === model?.id }, id)));
  choice.hidden = models.length < 2;
  byId("model-name").hidden = models.length > 1;
  byId("model-name").textContent = model?.id ?? "no model";
  byId("plain").hidden = model === null || model.specialists.length > 0;
  document.title = model ? `${model.id}: ultrafuser playground` : "ultrafuser playground";
  if (model?.contextLength) settings.limitTokens(model.contextLength);
  server.switchedOff = new Set(model?.specialists.filter((name) => server.switchedOff.has(name)));
  showLegend();
  showCompare();
  restyle();
}

function showLegend() {
  const names = server.model?.specialists ?? [];
  const chips = names.map((name, k) => {
    const isOn = !server.switchedOff.has(name);
    const isLast = isOn && server.switchedOff.size === names.length - 1;
    const title = isLast ? "One specialist has to take part" : `${isOn ? "Leave out" : "Let"} ${name}${isOn ? "" : " take part"}`;
    const chip = element("button", { type: "button", "aria-pressed": isOn, title, disabled: isLast }, element("i", { className: `c${k}` }), name);
    chip.addEventListener("click", () => {
      if (isOn) server.switchedOff.add(name);
      else server.switchedOff.delete(name);
      showLegend();
      byId("legend").children[k].focus();
    });
    return chip;
  });
  byId("legend").replaceChildren(...chips);
}

function showCompare() {
  const menu = byId("compare");
  const chosen = menu.value;
  const alone = server.model?.specialists.length > 1 ? server.model.specialists : [];
  const options = [
    element("option", { value: "" }, "nothing"),
    ...alone.map((name) => element("option", { value: `alone ${name}` }, `${name} alone`)),
    ...server.others.map(({ label, id }, i) => element("option", { value: `other ${i}`, disabled: id === null }, label)),
  ];
  menu.replaceChildren(...options);
  if (options.some((option) => option.value === chosen && !option.disabled)) menu.value = chosen;
  menu.parentElement.hidden = options.length === 1;
}

function showExamples(examples) {
  const groups = Object.entries(examples).map(([domain, questions]) => {
    const buttons = questions.map((question) => {
      const button = element("button", { type: "button" }, question);
      button.addEventListener("click", () => send(question));
      return button;
    });
    return element("div", {}, element("h3", {}, domain), ...buttons);
  });
  byId("examples").replaceChildren(...groups);
}

// ---------------------------------------------------------------- requests

/** Who answers: the served model, and the one beside it. */
function targets() {
  const { model, others } = server;
  const main = { label: model.id, base: "", model: model.id, specialists: model.specialists, alone: null };
  const [kind, ...rest] = byId("compare").value.split(" ");
  const name = rest.join(" ");
  if (kind === "alone") return [main, { ...main, label: `${name} alone`, alone: name }];
  if (kind === "other") {
    const { label, base, id, specialists } = others[Number(name)];
    return [main, { label, base, model: id, specialists, alone: null }];
  }
  return [main];
}

function request({ base, model, specialists, alone }) {
  const body = { model, stream: true, stream_options: { include_usage: true }, ...settings.sampling };
  if (specialists.length === 0) return body;
  Object.assign(body, { gate_weights: true, specialist_logprobs: CANDIDATES });
  const isMain = base === "";
  const taking = alone ? [alone] : specialists.filter((name) => !isMain || !server.switchedOff.has(name));
  return taking.length < specialists.length ? { ...body, specialists: taking } : body;
}

async function send(question) {
  if (question.trim() === "" || conversation.abort) return;
  if (!settings.check()) return;
  if (server.model === null) await connect();
  if (server.model === null) return;
  byId("message").value = "";
  fit();
  await conversation.ask(question.trim());
}

// ---------------------------------------------------------------- controls

function fit() {
  const box = byId("message");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight / 3)}px`;
}

function restyle() {
  const { colours, lines, newlines } = settings.values;
  document.body.classList.toggle("coloured", colours);
  document.body.classList.toggle("newlines", newlines && colours);
  if (server.palette) paint(server.palette, lines);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
  restyle();
}

function connectControls() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(byId("message").value);
  });
  byId("message").addEventListener("input", fit);
  byId("message").addEventListener("keydown", (event) => {
    const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
    if (!sends || matchMedia("(pointer: coarse)").matches) return;
    event.preventDefault();
    send(byId("message").value);
  });
  byId("stop").addEventListener("click", () => conversation.stop());
  byId("new").addEventListener("click", () => conversation.clear());
  byId("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  byId("model").addEventListener("change", (event) => {
    server.model = server.models.find((model) => model.id === event.target.value);
    showModel();
  });
  byId("export-json").addEventListener("click", () => exported(() => conversation.exportJson(settings.values)));
  byId("export-html").addEventListener("click", () => exported(() => conversation.exportHtml()));
  document.addEventListener("click", (event) => {
    if (!byId("export").contains(event.target)) byId("export").open = false;
  });
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    setKey(byId("key").value.trim());
    byId("key").value = "";
    await connect();
  });
}

async function exported(write) {
  byId("export").open = false;
  try {
    await write();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    failed(error);
  }
}

const theme = localStorage.getItem(THEME);
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
connectControls();
restyle();
connect();
