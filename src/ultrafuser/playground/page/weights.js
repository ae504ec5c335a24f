/** Arithmetic on the gate's weights. */

/** Index of the largest weight, and its margin over the second. */
export function leader(weights) {
  let best = 0;
  for (let k = 1; k < weights.length; k++) if (weights[k] > weights[best]) best = k;
  let second = 0;
  for (let k = 0; k < weights.length; k++) if (k !== best && weights[k] > second) second = weights[k];
  return { index: best, margin: weights[best] - second };
}

/** Mean weight of every specialist over tokens. Tokens without weights do not count. */
export function meanWeights(tokens, specialists) {
  const rows = tokens.filter((token) => token.weights).map((token) => token.weights);
  return specialists.map((_, k) => (rows.length ? rows.reduce((sum, row) => sum + row[k], 0) / rows.length : 0));
}
