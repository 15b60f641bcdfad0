// The sweep: the report's plots, and its SAEs with a link to each one's latents.
import { heading, linkTo, note } from "./parts/controls.js";

const COLUMNS = [
  ["hook_point", "Hook point"],
  ["d_sae", "Latents"],
  ["l0", "L0"],
  ["explained_variance", "Explained variance"],
  ["ce_loss_score", "CE loss score"],
  ["dead_fraction", "Dead"],
];

export function showOverview(place, _, known) {
  place.append(
    heading(`Sparse autoencoders of ${known.run}`),
    note([known.model, known.dataset && `on ${known.dataset}`].filter(Boolean).join(" ")),
    table(known),
  );
  if (!known.saes.length) return;
  place.append(pareto(known.saes), training(), densities());
  setUpPareto(known.saes);
  setUpCurves(known.saes, known.curves);
  setUpDensities(known.saes);
}

function table(known) {
  const cell = (value) => typeof value === "string" ? value : formatNumber(value);
  const rows = known.list.map((sae) => {
    const link = html("a", { href: linkTo({ sae: sae.name }) }, sae.name);
    const row = html(
      "tr",
      { "data-sae": sae.name },
      html("th", { scope: "row", class: "text" }, link),
      ...COLUMNS.map(([key]) =>
        html("td", { class: key === "hook_point" ? "text" : "" }, cell(sae.metrics[key] ?? sae[key]))
      ),
    );
    lightOnHover(row, sae.name);
    return row;
  });
  const head = html(
    "tr",
    {},
    html("th", { scope: "col", class: "text plain" }, "SAE"),
    ...COLUMNS.map(([key, title]) =>
      html("th", { scope: "col", class: key === "hook_point" ? "text plain" : "plain" }, title)
    ),
  );
  return html(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "SAEs of the sweep" },
    html("table", {}, html("thead", {}, head), html("tbody", {}, ...rows)),
  );
}

function figure(title, id, kind = "chart") {
  return html("figure", {}, html("figcaption", { id: `${id}-caption` }, title), html("div", { class: kind, id }));
}

function section(title, controls, ...content) {
  const head = html(
    "div",
    { class: "section-head" },
    html("h2", {}, title),
    html("div", { class: "controls", id: controls }),
  );
  return html("section", {}, head, ...content);
}

function pareto(saes) {
  const plots = [figure("Explained variance against L0", "pareto-variance")];
  if (saes.some((sae) => isNumber(sae.ce_loss_score))) plots.push(figure("CE loss score against L0", "pareto-loss"));
  return section(
    "Sparsity against fidelity",
    "pareto-controls",
    html("ul", { class: "legend", id: "pareto-legend", "aria-label": "Legend" }),
    html("div", { class: "pair" }, ...plots),
  );
}

function training() {
  const chart = html("div", { class: "chart wide", id: "curves-chart" });
  const legend = html("ul", { class: "legend lines", id: "curves-legend", "aria-label": "Show or hide an SAE" });
  const made = section(
    "Training",
    "curves-controls",
    html("figure", {}, html("figcaption", { id: "curves-caption" }, "Loss curves"), chart, legend),
  );
  made.id = "curves";
  return made;
}

function densities() {
  const made = section(
    "Latent densities",
    "densities-controls",
    html("div", { class: "multiples", id: "density-charts" }),
  );
  made.id = "densities";
  return made;
}
