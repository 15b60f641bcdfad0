// A latent: the report's drawing of it, and what needs the server: decoder neighbours, the same latent elsewhere, notes.
import { latentPath, put, read } from "./parts/api.js";
import { area, button, field, latentCard, latentLink, linkTo, note, problem, steerLink } from "./parts/controls.js";

// Return the server's description of a latent as the report's component reads it, with texts in place of token ids.
function asReport(latent) {
  const names = { tokens: Object.create(null), documents: Object.create(null) };
  const known = (text) => {
    names.tokens[text] = text;
    return text;
  };
  const context = (entry) => {
    if (entry.source) names.documents[entry.document] = entry.source;
    const active = Object.fromEntries(entry.activations.map((value, i) => [i, value]).filter(([, value]) => value));
    return [
      entry.activation,
      entry.peak,
      entry.tokens,
      active,
      entry.document,
      entry.position,
      entry.context,
      entry.texts,
    ];
  };
  const shown = latent.top.slice(0, 8);
  const seen = new Set(shown.map((entry) => entry.context));
  const sampled = latent.sampled.filter((entry) => !seen.has(entry.context));
  const scores = (line) =>
    Object.fromEntries(
      SCORE_LABELS.filter(([key]) => isNumber(line[key])).map((
        [key],
      ) => [key, [line[key], line[`${key}_low`], line[`${key}_high`]]]),
    );
  const own = latent.latent;
  const last = latent.histogram.findLastIndex((count) => count > 0) + 1;
  const one = (value) => ({ [own]: value });
  return {
    names,
    summary: {
      max: one(latent.max_activation),
      density: one(latent.density),
      score: one(latent.interestingness),
      peaks: Object.fromEntries(latent.neighbours.map((other) => [other.latent, other.peaks.map(known)])),
    },
    latent: {
      firings: latent.firings,
      mean: latent.mean_activation,
      histogram: latent.histogram.slice(0, last),
      end: (latent.histogram_end * last) / Math.max(1, latent.histogram.length),
      top: shown.map(context),
      sampled: sampled.map(context),
      promoted: latent.promoted.map(({ text, effect }) => [known(text), effect]),
      suppressed: latent.suppressed.map(({ text, effect }) => [known(text), effect]),
      neighbours: latent.neighbours.map((other) => [other.latent, other.score]),
      explanations: latent.explanations.length
        ? latent.explanations.map((line) => [line.explainer, line.explanation, scores(line), line.is_baseline])
        : undefined,
    },
  };
}

export async function showLatent(article, sae, number, known, current) {
  const found = await read(latentPath(sae.name, number));
  if (!current()) return;
  const { names, summary, latent } = asReport(found);
  const heading = drawLatent(
    article,
    number,
    summary,
    latent,
    names,
    (other) => latentLink(sae.name, other),
    sae.n_latents,
  );
  const actions = html(
    "div",
    { class: "controls actions" },
    html("a", { class: "plain", href: steerLink(sae.name, number) }, "Steer"),
    html("a", { class: "plain", href: linkTo({ page: "text", follow: `${number},${sae.name}` }) }, "Try text"),
  );
  article.querySelector(".latent-head").after(actions, noteEditor(sae.name, number, found.note));
  if (found.decoder_neighbours.length) article.append(decoderNeighbours(sae.name, found.decoder_neighbours));
  if (sae.has_weights && known.list.length > 1) elsewhere(article, sae.name, number, current);
  heading.focus({ preventScroll: true });
  if (matchMedia("(max-width: 52rem)").matches) heading.scrollIntoView();
  else scrollTo(0, 0);
}

function group(title, explanation, ...content) {
  return html("section", { class: "context-group" }, html("h4", {}, title), note(explanation), ...content);
}

function decoderNeighbours(sae, rows) {
  const list = html(
    "ol",
    { class: "cards" },
    ...rows.map((row) => html("li", {}, latentCard(row, { sae, several: false, right: row.cosine.toFixed(2) }))),
  );
  return group(
    "Writes nearly the same",
    "Latents of this SAE with the largest cosine between decoder directions.",
    list,
  );
}

async function elsewhere(article, sae, number, current) {
  const place = group(
    "The same latent in other SAEs",
    "By the cosine between decoder directions; 0.7 or more counts as the same feature.",
  );
  article.append(place);
  try {
    const { matches } = await read(`${latentPath(sae, number)}/matches`);
    if (!current()) return;
    const cards = matches.flatMap((match) =>
      match.latents.slice(0, 2).map((row) =>
        html("li", {}, latentCard(row, { sae: match.sae, right: row.cosine.toFixed(2) }))
      )
    );
    place.append(
      cards.length
        ? html("ol", { class: "cards" }, ...cards)
        : note("No other SAE of this run writes to the same hook point."),
    );
  } catch (error) {
    place.append(problem(error));
  }
}

function noteEditor(sae, latent, found) {
  const label = html("input", { type: "text", maxlength: 300, placeholder: "A label in your words", dir: "auto" });
  const comment = area(found?.comment, { rows: 2, maxlength: 10000, placeholder: "Comment" });
  const lists = html("input", { type: "text", placeholder: "Lists, separated by commas", dir: "auto" });
  const star = button("☆", null, { class: "plain star", "aria-label": "Star", "aria-pressed": "false" });
  const said = html("span", { class: "note", role: "status" });
  const draw = (saved) => {
    label.value = saved?.label ?? "";
    lists.value = (saved?.lists ?? []).join(", ");
    setStar(Boolean(saved?.starred));
  };
  const setStar = (on) => {
    star.setAttribute("aria-pressed", String(on));
    star.textContent = on ? "★" : "☆";
  };
  let saving = Promise.resolve();
  const save = () => {
    const body = {
      sae,
      latent,
      label: label.value,
      comment: comment.value,
      starred: star.getAttribute("aria-pressed") === "true",
      lists: lists.value.split(",").map((name) => name.trim()).filter(Boolean),
    };
    said.textContent = "Saving…";
    saving = saving.then(() => put("/api/notes", body)).then(
      () => said.textContent = "Saved",
      (error) => said.textContent = `Not saved: ${error.message}`,
    );
  };
  star.addEventListener("click", () => {
    setStar(star.getAttribute("aria-pressed") !== "true");
    save();
  });
  for (const input of [label, comment, lists]) input.addEventListener("change", save);
  draw(found);
  if (found && !found.fits) {
    said.textContent = "This note was made before the index was built anew; saving it keeps it.";
  }
  const rest = html(
    "details",
    { class: "note-rest" },
    html("summary", {}, "Comment and lists"),
    field("Comment", comment, true),
    field("Lists", lists, true),
  );
  rest.open = Boolean(found?.comment || found?.lists?.length);
  return html(
    "div",
    { class: "note-editor" },
    html("div", { class: "controls" }, star, field("Label", label, true), said),
    rest,
  );
}
