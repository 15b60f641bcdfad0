// Circuits of a run without transcoders: the latents that a prompt's next token depends on, by an estimate.
import { post } from "./parts/api.js";
import { button, choice, colouredText, editText, field, latentCard, linkTo, note, runner } from "./parts/controls.js";
import { asBody, promptField } from "./parts/prompt.js";

const WHY =
  "An attribution graph needs transcoders, and this run has none (make graph trains some). What its SAEs can say: how much each latent adds to the log-probability of the likeliest next token, estimated by its gradient times its activation.";

export function showAttribution(place, parameters, known, current) {
  const usable = known.list.filter((sae) => sae.has_weights);
  const places = [...new Set(usable.map((sae) => sae.hook_point))];
  const wanted = new Set(parameters.getAll("in"));
  const pickers = places.map((at) => {
    const names = usable.filter((sae) => sae.hook_point === at).map((sae) => sae.name);
    const offered = [...names.map((name) => [name, name]), ["", "none"]];
    const chosen = wanted.size ? names.find((name) => wanted.has(name)) ?? "" : names[0];
    return [at, choice(offered, chosen)];
  });
  const prompt = promptField("Prompt", "text", parameters);
  const [trace, stop] = [button("Trace", null, { id: "run" }), button("Cancel")];
  const result = html("div", { class: "result" });
  place.append(
    note(WHY),
    html("div", { class: "controls" }, ...pickers.map(([at, picker]) => field(at, picker))),
    prompt.element,
    html("div", { class: "controls" }, trace, stop),
    result,
  );
  const start = runner(trace, stop, result);
  trace.addEventListener("click", () => {
    const saes = pickers.map(([, picker]) => picker.value).filter(Boolean);
    history.replaceState(null, "", linkTo({ page: "circuits", ...prompt.address(), in: saes }));
    start(async (signal) => {
      const found = await post("/api/attribution", { ...asBody(prompt.value()), saes }, signal);
      draw(result, found, prompt);
    });
  });
  if (!prompt.isEmpty() && current()) trace.click();
}

const signed = (value) => `${value < 0 ? "−" : "+"}${formatNumber(Math.abs(value))}`;

function draw(result, { tokens, target, latents, errors }, prompt) {
  const texts = tokens.map((token) => token.text);
  const sums = texts.map(() => 0);
  for (const row of latents) sums[row.position] += Math.abs(row.score);
  const left = Object.values(errors).flat().reduce((sum, value) => sum + value, 0);
  const list = html("div", {});
  let at = null;
  const show = (i) => {
    at = at === i ? null : i;
    const rows = latents.filter((row) => at === null || row.position === at);
    const where = at === null ? "at all tokens" : `at token ${at}, “${visible(texts[at])}”`;
    list.replaceChildren(
      html("h2", {}, `Latents ${where}`),
      rows.length
        ? html("ol", { class: "cards" }, ...rows.map((row) => html("li", {}, card(row))))
        : html("p", { class: "empty" }, "None of the strongest latents is here."),
    );
  };
  const card = (row) => {
    const made = latentCard(row, { right: signed(row.score) });
    made.classList.add(row.score < 0 ? "against" : "for");
    const edit = editText({ ...row, action: "ablate", where: String(row.position) });
    const ablate = html("a", { href: linkTo({ page: "steer", ...prompt.address("prompt"), edit }) }, "ablate it");
    const why = `activation ${formatNumber(row.activation)} at token ${row.position}, “${
      visible(texts[row.position])
    }”; `;
    return html("div", { class: "attributed" }, made, html("p", { class: "note" }, why, ablate));
  };
  result.replaceChildren(
    html(
      "p",
      {},
      "The likeliest next token is ",
      html("code", { class: "token" }, compact(target.text)),
      `, with probability ${(100 * target.probability).toFixed(1)}%.`,
    ),
    html("div", { class: "card" }, colouredText(texts, sums, show, { what: "effect of its latents" })),
    note(
      `Tokens with more colour have latents that matter more; choose one to see only those. What the SAEs miss adds ${
        signed(left)
      } nats.`,
    ),
    list,
  );
  show(null);
}
