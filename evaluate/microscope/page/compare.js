// Two SAEs side by side on one text: how many latents fire at each token, what is missed, and which latents are strongest.
import { post } from "./parts/api.js";
import {
  area,
  button,
  choice,
  colouredText,
  field,
  heading,
  latentCards,
  linkTo,
  note,
  runner,
} from "./parts/controls.js";

export function showCompare(place, parameters, known, current) {
  const names = known.list.filter((sae) => sae.has_weights).map((sae) => sae.name);
  const sides = [
    choice(names, parameters.get("a") ?? names[0]),
    choice(names, parameters.get("b") ?? names[1] ?? names[0]),
  ];
  const text = area(parameters.get("text") ?? "", { rows: 3, maxlength: 20000, id: "compared-text" });
  const [run, stop] = [button("Compare", null, { id: "run" }), button("Cancel")];
  const result = html("div", { class: "result" });
  place.append(
    heading("Compare two SAEs"),
    note("On one text: how much each misses of every token's activation, and its strongest latents there."),
    html("div", { class: "controls" }, field("First", sides[0]), field("Second", sides[1])),
    field("Text", text, true),
    html("div", { class: "controls" }, run, stop),
    result,
  );
  const start = runner(run, stop, result);
  run.addEventListener("click", () => {
    const [a, b] = sides.map((side) => side.value);
    history.replaceState(null, "", linkTo({ page: "compare", a, b, text: text.value }));
    start(async (signal) =>
      draw(result, await post("/api/activations", { text: text.value, saes: [a, b], top: 8 }, signal), [a, b])
    );
  });
  if (text.value && current()) run.click();
}

function draw(result, found, names) {
  const texts = found.tokens.map((token) => token.text);
  const largest = Math.max(...names.flatMap((name) => found.saes[name].error), 1e-9);
  const lists = names.map(() => html("div", { "aria-live": "polite" }));
  const choose = (i) =>
    names.forEach((name, side) => {
      const { top, l0, error } = found.saes[name];
      lists[side].replaceChildren(
        html("h3", {}, `Token ${i}, “${visible(texts[i])}”`),
        note(`${l0[i]} latents, ${(100 * error[i]).toFixed(1)}% missed`),
        latentCards(name, top[i], (one) => formatNumber(one.activation)),
      );
    });
  const mean = (values) => values.slice(1).reduce((a, b) => a + b, 0) / Math.max(1, values.length - 1);
  const halves = names.map((name, side) => {
    const { l0, error } = found.saes[name];
    return html(
      "section",
      { class: "half" },
      html("h2", {}, name),
      note(
        `L0 ${mean(l0).toFixed(1)}, ${
          (100 * mean(error)).toFixed(1)
        }% missed on average. Darker tokens are missed more.`,
      ),
      html("div", { class: "card" }, colouredText(texts, error, choose, largest)),
      lists[side],
    );
  });
  result.replaceChildren(html("div", { class: "halves" }, ...halves));
  choose(texts.length - 1);
}
