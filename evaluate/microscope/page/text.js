// Try text: the strongest latents of each token, one latent over all tokens, and what fires on one text but not on another.
import { post } from "./parts/api.js";
import {
  button,
  choice,
  colouredText,
  field,
  heading,
  latentCard,
  latentCards,
  latentLink,
  linkTo,
  note,
  runner,
} from "./parts/controls.js";
import { asBody, promptField } from "./parts/prompt.js";

export function showText(place, parameters, known, current) {
  const text = promptField("Text", "text", parameters, { rows: 5, id: "text" });
  const other = promptField("The other text", "against", parameters, { rows: 3, id: "against" });
  const [run, stop] = [button("Run", null, { id: "run" }), button("Cancel")];
  const compare = html(
    "details",
    {},
    html("summary", {}, "Compare with another text"),
    note("Latents that fire on the text above and not on this one."),
    other.element,
  );
  compare.open = !other.isEmpty();
  const [status, result] = [note("", { role: "status" }), html("div", { class: "result" })];
  place.append(
    heading("Try text"),
    note(`The model runs on the text, up to ${known.limits.max_tokens} tokens, and every SAE reads its activations.`),
    text.element,
    compare,
    html("div", { class: "controls" }, run, stop),
    status,
    result,
  );
  const follow = parameters.get("follow");
  const start = runner(run, stop, result);
  const go = () =>
    start(async (signal) => {
      status.textContent = "The model runs…";
      try {
        if (!other.isEmpty()) await contrast(result, text.value(), other.value(), signal);
        else await activations(result, text.value(), follow, known, signal);
      } finally {
        status.textContent = "";
      }
    });
  run.addEventListener("click", () => {
    history.replaceState(null, "", linkTo({ page: "text", ...text.address(), ...other.address(), follow }));
    go();
  });
  text.element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run.click();
  });
  if (!text.isEmpty() && current()) go();
}

async function activations(result, prompt, follow, known, signal) {
  const [latent, ...name] = (follow ?? "").split(",");
  const followed = name.length ? { sae: name.join(","), latent: Number(latent) } : null;
  const body = { ...asBody(prompt), top: 6 };
  if (followed) {
    Object.assign(body, {
      saes: known.list.filter((sae) => sae.has_weights).map((sae) => sae.name),
      latents: { [followed.sae]: [followed.latent] },
    });
  }
  const found = await post("/api/activations", body, signal);
  const texts = found.tokens.map((token) => token.text);
  const names = Object.keys(found.saes);
  const picker = choice(names, followed?.sae && names.includes(followed.sae) ? followed.sae : names[0], {
    id: "text-sae",
  });
  const [tokens, list, beside] = [
    html("div", { class: "card" }),
    html("ol", { class: "cards follow" }),
    html("div", {}),
  ];
  const caption = note("", { role: "status" });
  let chosen = null;

  function colour(row) {
    const sae = found.saes[picker.value];
    const values = row ? row.activations : sae.top.map((top) => top.reduce((sum, one) => sum + one.activation, 0));
    tokens.replaceChildren(colouredText(texts, values, showToken));
    caption.replaceChildren(
      ...(row
        ? [
          "Coloured by ",
          html("a", { href: latentLink(picker.value, row.latent) }, `latent ${row.latent}`),
          `, up to ${formatNumber(row.max)}.`,
        ]
        : ["Coloured by the sum of each token's strongest latents. Choose a token, or a latent below."]),
    );
    chosen = row?.latent ?? null;
    for (const one of list.querySelectorAll("button")) {
      one.setAttribute("aria-pressed", String(Number(one.dataset.latent) === chosen));
    }
  }
  function showToken(i) {
    const rows = names.map((sae) =>
      html(
        "div",
        {},
        html("h4", {}, sae),
        latentCards(sae, found.saes[sae].top[i], (one) => formatNumber(one.activation)),
        note(`L0 ${found.saes[sae].l0[i]}, error ${(100 * found.saes[sae].error[i]).toFixed(0)}%`),
      )
    );
    beside.replaceChildren(
      html("h2", { tabindex: -1 }, `Token ${i}, “${visible(texts[i])}”`),
      html("div", { class: "columns" }, ...rows),
    );
    beside.firstElementChild.focus({ preventScroll: true });
  }
  function fill() {
    const rows = found.saes[picker.value].latents;
    list.replaceChildren(
      ...rows.map((row) => {
        const one = button(`${row.latent}`, () => colour(chosen === row.latent ? null : row), {
          class: "pill",
          "data-latent": row.latent,
          "aria-pressed": "false",
        });
        one.append(html("span", { class: "value" }, formatNumber(row.max)));
        return html("li", {}, one);
      }),
    );
    colour(picker.value === followed?.sae ? rows.find((row) => row.latent === followed.latent) : null);
  }
  picker.addEventListener("change", fill);
  result.replaceChildren(
    html("div", { class: "controls" }, field("SAE", picker)),
    caption,
    tokens,
    html("h2", {}, "Strongest latents"),
    list,
    beside,
  );
  fill();
}

async function contrast(result, a, b, signal) {
  const { latents } = await post("/api/contrast", { a: [a], b: [b] }, signal);
  const cards = latents.map((row) =>
    html("li", {}, latentCard(row, { right: `${formatNumber(row.a)} against ${formatNumber(row.b)}` }))
  );
  result.replaceChildren(
    html("h2", {}, "Fires on the first text only"),
    note("By the difference of the largest activations, as a share of each latent's maximum in the index."),
    cards.length
      ? html("ol", { class: "cards" }, ...cards)
      : html("p", { class: "empty" }, "No latent tells these texts apart."),
  );
}
