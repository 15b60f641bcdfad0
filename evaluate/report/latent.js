// One latent: its statistics, histogram, promoted tokens, neighbours, and the contexts in which it fires.
// Characters that are invisible, change the text direction or look like a space are shown by their code points.
const UNSEEN =
  /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}\u00a0\u034f\u115f\u1160\u2000-\u200a\u202f\u205f\u3000\u3164\ufe00-\ufe0f\u{e0100}-\u{e01ef}]/gu;
const codePoint = (character) => `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;

function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍").replace(UNSEEN, codePoint) || "∅";
}

// Show spaces as dots, and a long run of spaces as a count.
const compact = (text) =>
  visible(text).replace(/ +/g, (run) => (run.length > 3 ? `·×${run.length}` : "·".repeat(run.length)));

const tokenText = (names, id) => names.tokens[id] ?? `⟨${id}⟩`;

function tokenChip(names, id) {
  return html("code", { class: "token", dir: "auto" }, compact(tokenText(names, id)));
}

// Return the texts of a context's tokens: stored with the context if a token splits a character, else each token's own.
const contextTexts = ([, , tokens, , , , , inContext], names) => inContext ?? tokens.map((id) => tokenText(names, id));

// Group a token that only continues a character with the token where the character begins.
function wholeCharacters(texts) {
  const groups = [];
  texts.forEach((
    text,
    i,
  ) => (text || !groups.length ? groups.push({ text, tokens: [i] }) : groups.at(-1).tokens.push(i)));
  return groups;
}

function drawContext(entry, names, maximum) {
  const [activation, peak, , active, document_, position, context] = entry;
  const source = names.documents[document_] ?? (document_ >= 0 ? `document ${document_}` : `context ${context}`);
  const origin = position >= 0 ? `${source}, token ${position.toLocaleString("en")}` : source;
  const line = html("li", { class: "context" });
  const text = html("p", { class: "context-text", dir: "auto" });
  for (const { text: characters, tokens } of wholeCharacters(contextTexts(entry, names))) {
    const values = tokens.map((i) => active[i] ?? 0);
    const strongest = Math.max(...values);
    const word = visible(characters);
    const span = strongest
      ? html(
        tokens.includes(peak) ? "mark" : "span",
        { class: "active", style: `--heat: ${Math.round(12 + 58 * Math.min(1, strongest / maximum))}%` },
        word,
      )
      : html("span", {}, word);
    const spread = tokens.length > 1 ? `${word} (${tokens.length} tokens)` : word;
    span.dataset.tip = strongest
      ? `${spread}\nactivation ${values.map(formatNumber).join(", ")}`
      : `${spread}\nnot active`;
    text.append(span);
  }
  line.append(html("p", { class: "context-head" }, html("strong", {}, formatNumber(activation)), ` ${origin}`), text);
  return line;
}

function tokenTable(title, rows, names) {
  const largest = Math.max(...rows.map(([, effect]) => Math.abs(effect)), 1e-9);
  const list = html(
    "ol",
    { class: "effects" },
    ...rows.map(([id, effect]) =>
      html(
        "li",
        { style: `--share: ${(100 * Math.abs(effect)) / largest}%` },
        tokenChip(names, id),
        html("span", {}, effect.toFixed(2)),
      )
    ),
  );
  return html("div", {}, html("h4", {}, title), list);
}

function contextList(title, note, contexts, names, maximum) {
  const list = html("ol", { class: "contexts" }, ...contexts.map((context) => drawContext(context, names, maximum)));
  return html("section", { class: "context-group" }, html("h4", {}, title), html("p", { class: "note" }, note), list);
}

const SCORE_LABELS = [
  [
    "detection",
    "Detection",
    "Balanced accuracy in telling held-out contexts with the latent from those without it; chance is 0.5",
  ],
  ["fuzzing", "Fuzzing", "Balanced accuracy in telling right highlights from wrong ones; chance is 0.5"],
  ["simulation", "Simulation", "Correlation of predicted and actual activations; chance is 0"],
  ["intruder", "Intruder", "How often the context without the latent is found among five; chance is 0.2"],
  ["balanced_accuracy", "Per token", "Balanced accuracy over all held-out tokens, for rules; chance is 0.5"],
  [
    "causal",
    "Causal",
    "How much more often the rule fires on generated text if this latent is steered than if another one is; chance is 0",
  ],
];

function scoreCell(score) {
  if (!score) return html("td", {}, "–");
  const [value, low, high] = score;
  const cell = html("td", {}, value.toFixed(2));
  if (low !== null) cell.append(html("span", { class: "bounds" }, ` ${low.toFixed(2)}–${high.toFixed(2)}`));
  return cell;
}

// Show each explanation once, because one that a language model judged has the same text; name explainers if several.
function explanationTexts(explanations) {
  const by = new Map();
  for (const [explainer, text, , baseline] of explanations) if (!baseline && !by.has(text)) by.set(text, explainer);
  return [...by].map(([text, explainer]) =>
    html(
      "p",
      { class: "explanation", dir: "auto" },
      ...(by.size > 1 ? [html("span", { class: "explainer" }, `${explainer} `)] : []),
      text,
    )
  );
}

// What explainers say of the latent, and how well that predicts it in documents that they never saw.
function explanationTable(explanations) {
  const shown = SCORE_LABELS.filter(([key]) => explanations.some(([, , scores]) => scores[key]));
  const head = html(
    "tr",
    {},
    html("th", {}, "Explainer"),
    ...shown.map(([, label, tip]) => html("th", { title: tip }, label)),
  );
  const rows = explanations.map(([explainer, , scores, baseline]) =>
    html(
      "tr",
      baseline ? { class: "baseline" } : {},
      html("th", { scope: "row" }, baseline ? `baseline: ${explainer}` : explainer),
      ...shown.map(([key]) => scoreCell(scores[key])),
    )
  );
  return html(
    "section",
    { class: "explanations" },
    html("h4", {}, "Explanations"),
    ...explanationTexts(explanations),
    html("div", { class: "scroll" }, html("table", {}, html("thead", {}, head), html("tbody", {}, ...rows))),
    html(
      "p",
      { class: "note" },
      "Scored on held-out documents, with 95% intervals over documents. " +
        "A high score says that the words predict when the latent fires, not why.",
    ),
  );
}

const fact = (name, value) => html("div", {}, html("dt", {}, name), html("dd", {}, value));

function drawLatent(article, number, summary, latent, names, linkTo, total) {
  const maximum = summary.max[number];
  const heading = html("h3", { id: "latent-heading", tabindex: -1 }, `Latent ${number.toLocaleString("en")}`);
  const step = (to, text, label) =>
    to < 0 || to >= total
      ? html("span", { class: "step", "aria-hidden": "true" }, text)
      : html("a", { class: "step", href: linkTo(to), "aria-label": label }, text);
  const head = html(
    "div",
    { class: "latent-head" },
    heading,
    html("div", { class: "steps" }, step(number - 1, "‹", "Previous latent"), step(number + 1, "›", "Next latent")),
  );
  const facts = html(
    "dl",
    { class: "figures" },
    fact("Density", `${formatNumber(100 * summary.density[number])}%`),
    fact("Fires on", `${latent.firings.toLocaleString("en")} tokens`),
    fact("Max", formatNumber(maximum)),
    fact("Mean when active", formatNumber(latent.mean)),
    fact("Interestingness", summary.score[number].toFixed(2)),
  );
  article.replaceChildren(head, facts);
  if (!latent.firings) {
    article.append(html("p", { class: "empty" }, "This latent did not fire on any indexed token."));
    return heading;
  }
  if (latent.explanations) article.append(explanationTable(latent.explanations));
  const panels = html("div", { class: "panels" });
  const chart = html("div", { class: "chart" });
  const neighbours = html(
    "ol",
    { class: "neighbours" },
    ...latent.neighbours.map(([other, score]) =>
      html(
        "li",
        {},
        html("a", { href: linkTo(other) }, `${other}`),
        ...summary.peaks[other].slice(0, 2).map((id) => tokenChip(names, id)),
        html("span", {}, score.toFixed(2)),
      )
    ),
  );
  const together = html(
    "div",
    {},
    html("h4", {}, "Fires together with"),
    latent.neighbours.length ? neighbours : html("p", { class: "note" }, "No other latent, on the sampled tokens."),
  );
  panels.append(
    html("div", { class: "stack" }, html("div", {}, html("h4", {}, "Activations when active"), chart), together),
  );
  if (latent.promoted.length) {
    panels.append(
      html(
        "div",
        { class: "effect-pair" },
        tokenTable("Promotes", latent.promoted, names),
        tokenTable("Suppresses", latent.suppressed, names),
      ),
    );
  }
  article.append(
    panels,
    contextList("Strongest contexts", "The contexts with the highest activation.", latent.top, names, maximum),
  );
  if (latent.sampled.length) {
    article.append(
      contextList(
        "Across the range",
        "A uniform sample of all other contexts in which it fires, from strong to weak.",
        latent.sampled,
        names,
        maximum,
      ),
    );
  }
  const edges = latent.histogram.map((_, i) => (latent.end * i) / latent.histogram.length).concat(latent.end);
  drawResponsive(chart, (width, height) =>
    drawHistogram(
      width,
      height,
      { edges, counts: latent.histogram },
      {
        label: `Histogram of activations, up to ${formatNumber(maximum)}`,
        xTitle: "Activation",
        yTitle: "Tokens",
        unit: "tokens",
        colour: "var(--a0)",
      },
    ))();
  return heading;
}
