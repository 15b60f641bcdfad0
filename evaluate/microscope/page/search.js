// Search by words and by meaning, ranked together.
import { read } from "./parts/api.js";
import { choice, field, heading, latentCard, linkTo, note } from "./parts/controls.js";

export async function showSearch(place, parameters, known, current) {
  const [query, within] = [parameters.get("q") ?? "", parameters.get("in") ?? ""];
  document.getElementById("search-box").value = query;
  const picker = choice([["", "all"], ...known.list.map((sae) => [sae.name, sae.name])], within);
  picker.addEventListener("change", () => location.hash = linkTo({ page: "search", q: query, in: picker.value }));
  const status = note("Searching…", { role: "status" });
  place.append(heading(`Latents for “${query}”`), html("div", { class: "controls" }, field("SAE", picker)), status);
  const address = new URLSearchParams(within ? { q: query, sae: within } : { q: query });
  const found = await read(`/api/search?${address}`);
  if (!current()) return;
  const n = found.results.length;
  status.textContent = [`${n} latent${n === 1 ? "" : "s"}`, found.note].filter(Boolean).join("; ");
  if (found.notes.length) {
    const cards = found.notes.map((row) => html("li", {}, latentCard(row, { right: "note" })));
    place.append(html("h2", {}, "In your notes"), html("ol", { class: "cards" }, ...cards));
  }
  if (n) place.append(html("h2", {}, "Latents"), html("ol", { class: "cards results" }, ...found.results.map(result)));
  else place.append(html("p", { class: "empty" }, "Nothing fits. Try other words, or fewer."));
}

function result(row) {
  const card = latentCard(row, { right: row.cosine ? row.cosine.toFixed(2) : "" });
  const why = [
    row.places.meaning && `place ${row.places.meaning} by meaning`,
    row.places.words && `place ${row.places.words} by words`,
    `promotes ${row.promoted.slice(0, 4).map((text) => compact(text)).join(" ")}`,
  ];
  card.append(html("span", { class: "why" }, why.filter(Boolean).join(" · ")));
  return html("li", {}, card);
}
