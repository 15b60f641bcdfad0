// Two SAEs, or an SAE and an earlier checkpoint of it, side by side on one text: how many latents fire at each token,
// what is missed, and which latents are strongest.
import { post } from "./parts/api.js";
import { button, choice, colouredText, field, heading, latentCards, linkTo, note, runner } from "./parts/controls.js";
import { asBody, promptField } from "./parts/prompt.js";

const [ASKED, SHOWN] = [50, 8];
const NO_CHECKPOINTS =
  "Training saved no earlier states of these SAEs to compare them with; with save_every_tokens it does.";

export function showCompare(place, parameters, known, current) {
  const sides = known.list.filter((sae) => sae.has_weights).flatMap((sae) => [
    { name: sae.name, sae: sae.name, title: sae.name },
    ...sae.checkpoints.map(({ name, tokens }) => ({
      name,
      sae: sae.name,
      title: `${sae.name}, after ${tokens.toLocaleString("en")} tokens`,
    })),
  ]);
  const offered = sides.map(({ name, title }) => [name, title]);
  const pickers = ["a", "b"].map((key, i) => choice(offered, parameters.get(key) ?? sides[i]?.name ?? sides[0]?.name));
  const text = promptField("Text", "text", parameters, { rows: 3, id: "compared-text" });
  const [run, stop] = [button("Compare", null, { id: "run" }), button("Cancel")];
  const result = html("div", { class: "result" });
  place.append(
    heading("Compare two SAEs"),
    note("On one text: how much each misses of every token's activation, and its strongest latents there."),
    html("div", { class: "controls" }, field("First", pickers[0]), field("Second", pickers[1])),
    ...(sides.some(({ name, sae }) => name !== sae) ? [] : [note(NO_CHECKPOINTS)]),
    text.element,
    html("div", { class: "controls" }, run, stop),
    result,
  );
  const start = runner(run, stop, result);
  run.addEventListener("click", () => {
    const [a, b] = pickers.map((picker) => picker.value);
    history.replaceState(null, "", linkTo({ page: "compare", a, b, ...text.address() }));
    const chosen = [a, b].map((name) => sides.find((side) => side.name === name));
    start(async (signal) =>
      draw(
        result,
        await post("/api/activations", { ...asBody(text.value()), saes: [a, b], top: ASKED }, signal),
        chosen,
      )
    );
  });
  if (!text.isEmpty() && current()) run.click();
}

function draw(result, found, sides) {
  const texts = found.tokens.map((token) => token.text);
  const largest = Math.max(...sides.flatMap(({ name }) => found.saes[name].error), 1e-9);
  const sameLatents = sides[0].sae === sides[1].sae && sides[0].name !== sides[1].name;
  const lists = sides.map(() => html("div", { "aria-live": "polite" }));
  const choose = (i) =>
    sides.forEach(({ name, sae }, side) => {
      const { top, l0, error } = found.saes[name];
      const there = new Map(found.saes[sides[1 - side].name].top[i].map((one) => [one.latent, one.activation]));
      const none = found.saes[sides[1 - side].name].l0[i] > ASKED ? "weak" : "not active";
      const beside = ({ latent }) => there.has(latent) ? formatNumber(there.get(latent)) : none;
      lists[side].replaceChildren(
        html("h3", {}, `Token ${i}, “${visible(texts[i])}”`),
        note(`${l0[i]} latents, ${(100 * error[i]).toFixed(1)}% missed`),
        latentCards(
          sae,
          top[i].slice(0, SHOWN),
          (one) => formatNumber(one.activation) + (sameLatents ? ` (other: ${beside(one)})` : ""),
        ),
      );
    });
  const mean = (values) => values.slice(1).reduce((a, b) => a + b, 0) / Math.max(1, values.length - 1);
  const halves = sides.map(({ name, title }, side) => {
    const { l0, error } = found.saes[name];
    return html(
      "section",
      { class: "half" },
      html("h2", {}, title),
      note(
        `L0 ${mean(l0).toFixed(1)}, ${
          (100 * mean(error)).toFixed(1)
        }% missed on average. Tokens with more colour are missed more.`,
      ),
      html("div", { class: "card" }, colouredText(texts, error, choose, { largest, what: "share missed" })),
      lists[side],
    );
  });
  result.replaceChildren(
    ...(sameLatents
      ? [note("These are the same latents at two times of their training; they are named as at its end.")]
      : []),
    html("div", { class: "halves" }, ...halves),
  );
  choose(texts.length - 1);
}
