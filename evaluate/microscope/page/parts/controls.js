// Parts that several pages use: links, form fields, chips of latents, and buttons that wait for an answer.
import { read, saePath } from "./api.js";

export const linkTo = (parameters) => {
  const kept = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return `#${new URLSearchParams(kept.flatMap(([key, value]) => [value].flat().map((one) => [key, one])))}`;
};
export const latentLink = (sae, latent) => linkTo({ sae, latent });
export const steerLink = (sae, latent, more = {}) =>
  linkTo({ page: "steer", edit: editText({ sae, latent }), ...more });

// An edit as text in an address: latent, action, strength, unit and where, then the SAE, whose name may have commas.
// Without a strength, the server suggests one.
export const editText = ({ sae, latent, action = "add", strength = "", unit = "max", where = "all" }) =>
  [latent, action, strength, unit, where, sae].join(",");
export function readEdit(text) {
  const [latent, action, strength, unit, where, ...name] = text.split(",");
  const amount = strength ? Number(strength) : "";
  return { sae: name.join(","), latent: Number(latent), action, strength: amount, unit, where };
}

export const field = (label, control, wide = false) =>
  html("label", { class: wide ? "field stretch" : "field" }, html("span", {}, label), control);

export function choice(values, chosen, attributes = {}) {
  const select = html(
    "select",
    attributes,
    ...values.map((value) => {
      const [key, text] = [value].flat().length === 2 ? value : [value, value];
      return html("option", { value: key }, text);
    }),
  );
  if (chosen !== null && chosen !== undefined) select.value = chosen;
  return select;
}

export function number(value, { min, max, step = "any", ...more } = {}) {
  const input = html("input", { type: "number", min, max, step, ...more });
  input.value = value;
  return input;
}

export function area(value, { rows = 4, ...more } = {}) {
  const text = html("textarea", { rows, spellcheck: "false", dir: "auto", ...more });
  text.value = value ?? "";
  return text;
}

export function button(text, action, attributes = {}) {
  const made = html("button", { type: "button", class: "plain", ...attributes }, text);
  if (action) made.addEventListener("click", action);
  return made;
}

export const heading = (text, level = "h1") => html(level, { tabindex: -1, class: "page-heading" }, text);
export const note = (text, attributes = {}) => html("p", { class: "note", ...attributes }, text);
export const problem = (error) => html("p", { class: "problem", role: "alert" }, error.message);

// What a latent is called: the label of its note, else its explanation, else the tokens it fires on.
export function about(row) {
  if (row.label) return [html("strong", {}, row.label)];
  if (row.explanation) return [row.explanation];
  return (row.peaks ?? []).slice(0, 3).map((text) => chip(text));
}
export const chip = (text) => html("code", { class: "token", dir: "auto" }, compact(text));

export function latentCard(row, { sae = row.sae, right = "", several = true } = {}) {
  const name = several ? `${sae} · ${row.latent}` : `${row.latent}`;
  return html(
    "a",
    { href: latentLink(sae, row.latent), class: "card-link" },
    html("span", { class: "number" }, row.starred ? `★ ${name}` : name),
    html("span", { class: "about", dir: "auto" }, ...about(row)),
    html("span", { class: "value" }, right),
  );
}

// A list of latents of one SAE; what they are about is asked of the server, and kept.
const known = new Map();
export function latentCards(sae, rows, right) {
  const cards = rows.map((row) => latentCard(row, { sae, several: false, right: right(row) }));
  const missing = [...new Set(rows.map((row) => row.latent))].filter((latent) => !known.has(`${sae} ${latent}`));
  const fill = () =>
    rows.forEach((row, i) => {
      const found = known.get(`${sae} ${row.latent}`);
      if (found) cards[i].querySelector(".about").replaceChildren(...about(found));
    });
  if (missing.length) {
    read(`${saePath(sae)}/latents?alive=false&limit=500&numbers=${missing.slice(0, 300).join(",")}`).then((page) => {
      page.latents.forEach((row) => known.set(`${sae} ${row.latent}`, row));
      fill();
    }, () => {});
  } else fill();
  return html("ol", { class: "cards" }, ...cards.map((card) => html("li", {}, card)));
}

// Run `work(signal)` with a button that says it waits and a second one that cancels; show what goes wrong in `place`.
export function runner(start, stop, place) {
  let controller = null;
  stop.hidden = true;
  stop.addEventListener("click", () => controller?.abort());
  return async (work) => {
    controller?.abort();
    const mine = controller = new AbortController();
    start.disabled = true;
    stop.hidden = false;
    place.replaceChildren();
    try {
      await work(mine.signal);
    } catch (error) {
      if (error.name !== "AbortError") place.replaceChildren(problem(error));
    } finally {
      if (mine === controller) {
        start.disabled = false;
        stop.hidden = true;
      }
    }
  };
}

// A text whose tokens are coloured by values, which `what` names; `choose(i)` is called for a token that is chosen.
export function colouredText(
  texts,
  values,
  choose = null,
  { largest = Math.max(...values, 1e-9), what = "activation" } = {},
) {
  const text = html("p", { class: "context-text tokens-of-text", dir: "auto" });
  for (const { text: characters, tokens } of wholeCharacters(texts)) {
    const value = Math.max(...tokens.map((i) => values[i] ?? 0));
    const heat = value > 0 ? Math.round(12 + 58 * Math.min(1, value / largest)) : 0;
    const attributes = { class: value > 0 ? "active" : "quiet", style: `--heat: ${heat}%` };
    const word = visible(characters);
    const span = choose ? html("button", { type: "button", ...attributes }, word) : html("span", attributes, word);
    describe(span, () => `${word}\n${what} ${value > 0 ? formatNumber(value) : "0"}`);
    if (choose) span.addEventListener("click", () => choose(tokens[0], span));
    text.append(span);
  }
  return text;
}
