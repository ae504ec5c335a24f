/**
 * Colours of the tokens: the leading specialist's, greyer the less it leads. The same rules as in display/palette.py.
 *
 * The tokens carry classes (`c1 l5`: specialist 1, level 5), and one style sheet colours the classes. A change of theme
 * rewrites the sheet and touches no token.
 */

import { leader } from "./weights.js";

const LEVELS = 8;
const LINES = ["solid", "dashed", "dotted", "double", "wavy"];
const DARK_NEUTRAL = "#3b424c";
const STRENGTH = { light: 0.72, dark: 0.62 }; // of the pure colour at a lead of 1

const sheet = new CSSStyleSheet();
document.adoptedStyleSheets = [sheet];

function components(hex) {
  return [1, 3, 5].map((start) => Number.parseInt(hex.slice(start, start + 2), 16));
}

/** `foreground` laid over `background` with an opacity from 0 to 1. */
export function blend(background, foreground, amount) {
  const under = components(background);
  const mixed = components(foreground).map((value, i) => Math.round(under[i] + (value - under[i]) * amount));
  return `#${mixed.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
}

/** Black or white, whichever is easier to read. 0.179 is the luminance of equal contrast (WCAG 2.1). */
export function inkOn(background) {
  const [red, green, blue] = components(background)
    .map((value) => value / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000000" : "#ffffff";
}

/** The classes of a token. A token without weights has no colour. */
export function tokenClasses(weights) {
  if (!weights) return "t";
  const { index, margin } = leader(weights);
  return `t c${index} l${Math.min(LEVELS, Math.round(margin * LEVELS))}`;
}

export function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Write the style sheet for the palette of the server and the theme of the page. */
export function paint(palette, lines) {
  const dark = isDark();
  const neutral = dark ? DARK_NEUTRAL : palette.neutral;
  const strength = dark ? STRENGTH.dark : STRENGTH.light;
  const rules = palette.colours.flatMap((colour, index) => {
    const levels = Array.from({ length: LEVELS + 1 }, (_, level) => {
      const background = blend(neutral, colour, (strength * level) / LEVELS);
      return `.coloured .t.c${index}.l${level} { background: ${background}; color: ${inkOn(background)} }`;
    });
    const line = `.t.c${index} { text-decoration: underline ${LINES[index % LINES.length]} 1.5px; text-underline-offset: .2em }`;
    return [`.c${index} { --c: ${colour} }`, ...levels, ...(lines ? [line] : [])];
  });
  sheet.replaceSync(rules.join("\n"));
}
