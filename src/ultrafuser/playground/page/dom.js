/** Elements, texts and files of the page. Text is only ever set as text, never as HTML. */

/** An element: `element("p", {className: "note"}, "text", child)`. Keys with a dash or `role` become attributes. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Tell a screen reader something, once nothing else is being said. */
export function announce(text) {
  byId("status").textContent = text;
}

/** A token on one line: its whitespace made visible. */
export function visible(text) {
  return text === "" ? "(no text)" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");
}

export function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}

/** Copy text. Without HTTPS browsers have no clipboard object, so that the old command is used. */
export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = element("textarea", { value: text, className: "hidden" });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

/** A button whose click copies what `text` returns, and which says so for a moment. */
export function copyButton(label, text) {
  const button = element("button", { type: "button", className: "quiet" }, label);
  button.addEventListener("click", async () => {
    await copy(text());
    button.textContent = "Copied";
    announce("Copied");
    setTimeout(() => (button.textContent = label), 1200);
  });
  return button;
}

/** Offer a blob as a download. */
export function download(blob, name) {
  const address = URL.createObjectURL(blob);
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
