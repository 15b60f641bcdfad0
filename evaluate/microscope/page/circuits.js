// Circuits: the attribution graph of a prompt through the run's transcoders, drawn by the component of `thresher graph`.
import { showAttribution } from "./attribution.js";
import { post, run } from "./parts/api.js";
import { button, choice, field, heading, latentLink, linkTo, note, runner } from "./parts/controls.js";
import { asBody, promptField } from "./parts/prompt.js";

export function showCircuits(place, parameters, known, current) {
  place.append(heading("Circuits"));
  if (!known.transcoders.length) return showAttribution(place, parameters, known, current);
  const prompt = promptField("Prompt", "text", parameters);
  const [trace, stop] = [button("Trace", null, { id: "run" }), button("Cancel")];
  const result = html("div", { class: "result" });
  place.append(
    note(`What leads to the next token, through ${known.transcoders.length} transcoders.`),
    prompt.element,
    html("div", { class: "controls" }, trace, stop),
    result,
  );
  const start = runner(trace, stop, result);
  trace.addEventListener("click", () => {
    history.replaceState(null, "", linkTo({ page: "circuits", ...prompt.address() }));
    start(async (signal) => draw(result, await post("/api/graph", asBody(prompt.value()), signal)));
  });
  if (!prompt.isEmpty() && current()) trace.click();
}

// The transcoder of a layer and the number of a latent in it; a cross-layer transcoder counts the latents of all layers.
function finder(saes, nLayers, sizes) {
  const layers = new Map(Object.entries(saes).map(([name, hook]) => [Number(hook.match(/\d+/)?.[0]), name]));
  const names = Object.keys(saes);
  return (layer, latent) => {
    if (names.length === 1 && saes[names[0]].includes(" + ")) {
      return latentLink(names[0], layer * (sizes.get(names[0]) / nLayers) + latent);
    }
    return layers.has(layer) ? latentLink(layers.get(layer), latent) : null;
  };
}

async function draw(result, found) {
  const { summary } = found;
  const facts = [
    ["Replacement score", summary.replacement_score],
    ["Completeness score", summary.completeness_score],
    ["Kept nodes", summary.kept_nodes],
    ["Active latents", summary.active_latents],
  ];
  const figure = (title, id) => html("figure", {}, html("figcaption", {}, title), html("ol", { class: "edges", id }));
  const shown = choice([], null, { id: "shown" });
  result.replaceChildren(
    html("dl", { class: "figures" }, ...facts.map(([title, value]) => fact(title, formatNumber(value)))),
    html("div", { class: "controls" }, field("Edges shown", shown)),
    note(
      "Columns are tokens, rows are layers. Choose a node to see what raises or lowers it, and what it raises or lowers.",
    ),
    html("div", { class: "scroll graph", id: "graph", role: "group", "aria-label": "Graph" }),
    html("h2", {}, "Node"),
    note("", { id: "node-note", role: "status" }),
    html("div", { class: "pair" }, figure("From", "from"), figure("To", "to")),
  );
  const sizes = new Map((await run()).list.map((sae) => [sae.name, sae.n_latents]));
  drawGraph(found, finder(found.saes, found.n_layers, sizes));
}
