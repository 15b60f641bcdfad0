// One SAE: its latents, sorted and filtered by the server, and beside them the chosen one.
import { read, saePath } from "./parts/api.js";
import { showLatent } from "./latent_page.js";
import { about, choice, field, heading, latentLink, linkTo, number, problem } from "./parts/controls.js";

const STEP = 80;
const SORTS = [["interestingness", "interestingness"], ["density", "density"], ["max_activation", "max activation"], [
  "latent",
  "number",
]];

export async function showBrowser(place, parameters, known, current) {
  const name = parameters.get("sae");
  const sae = known.list.find((one) => one.name === name);
  if (!sae) throw new Error(`There is no SAE “${name}” in this run.`);
  const wanted = parameters.get("latent");
  const latent = /^\d+$/.test(wanted ?? "") && Number(wanted) < sae.n_latents ? Number(wanted) : null;
  if (place.dataset.sae !== name) build(place, sae, known);
  mark(place, latent);
  const article = place.querySelector("article");
  if (latent === null) drawSae(article, sae);
  else await showLatent(article, sae, latent, known, current);
}

function mark(place, latent) {
  for (const link of place.querySelectorAll(".latents a")) {
    if (Number(link.dataset.latent) === latent) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function drawSae(article, sae) {
  const facts = [["Explained variance", "explained_variance"], ["L0", "l0"], ["CE loss score", "ce_loss_score"], [
    "Dead",
    "dead_fraction",
  ]];
  const chart = html("div", { class: "chart" });
  article.replaceChildren(
    html("dl", { class: "figures" }, ...facts.map(([title, key]) => fact(title, formatNumber(sae.metrics[key])))),
    html("p", { class: "empty" }, "Choose a latent to see what it responds to."),
  );
  const counts = sae.density_histogram?.counts ?? [];
  const used = counts.map((count, i) => (count > 0 ? i : -1)).filter((i) => i >= 0);
  if (!used.length) return;
  const part = {
    counts: counts.slice(used[0], used.at(-1) + 1),
    edges: sae.density_histogram.edges.slice(used[0], used.at(-1) + 2),
  };
  article.append(html("div", { class: "panels wide" }, html("div", {}, html("h4", {}, "Latent densities"), chart)));
  const label = `Histogram of the latent densities of ${sae.name}`;
  drawResponsive(
    chart,
    (width, height) =>
      drawHistogram(width, height, part, { label, xTitle: "Density", colour: "var(--a0)", tick: powerOfTen }),
  )();
}

function build(place, sae, known) {
  place.dataset.sae = sae.name;
  const picker = choice(known.list.map((one) => one.name), sae.name);
  picker.addEventListener("change", () => location.hash = linkTo({ sae: picker.value }));
  const list = html("ol", { class: "latents", "aria-label": "Latents" });
  const status = html("p", { class: "note", role: "status" });
  const sort = choice(SORTS, "interestingness");
  const alive = html("input", { type: "checkbox" });
  alive.checked = true;
  const starred = html("input", { type: "checkbox" });
  const [least, most] = [number("", { min: 0, max: 100, size: 6 }), number("", { min: 0, max: 100, size: 6 })];
  const [fires, promotes] = [html("input", { type: "search", size: 10 }), html("input", { type: "search", size: 10 })];
  const filters = html(
    "details",
    { class: "filters" },
    html("summary", {}, "Filters"),
    html(
      "div",
      { class: "controls" },
      field("Fires on", fires),
      field("Promotes", promotes),
      field("Density from, %", least),
      field("to, %", most),
      html("label", { class: "field" }, alive, "Hide dead"),
      html("label", { class: "field" }, starred, "Starred only"),
    ),
  );
  place.replaceChildren(
    html("div", { class: "browser-top" }, heading(sae.name, "h1"), field("SAE", picker)),
    html(
      "p",
      { class: "note" },
      `${sae.n_latents.toLocaleString("en")} latents at ${sae.hook_point}, indexed on ${
        (sae.n_rows ?? 0).toLocaleString("en")
      } tokens.`,
    ),
    html(
      "div",
      { class: "browser-body" },
      html(
        "div",
        { class: "list-pane" },
        html("div", { class: "controls" }, field("Sort by", sort)),
        filters,
        status,
        list,
      ),
      html("article", { "aria-label": "Latent" }),
    ),
  );

  let total = 0;
  let reading = null;
  function row(latent) {
    const link = html(
      "a",
      { href: latentLink(sae.name, latent.latent), "data-latent": latent.latent },
      html("span", { class: "number" }, latent.starred ? `★ ${latent.latent}` : `${latent.latent}`),
      html("span", { class: "peaks", dir: "auto" }, ...about(latent)),
    );
    const value = {
      density: `${formatNumber(100 * latent.density)}%`,
      max_activation: formatNumber(latent.max_activation),
    }[sort.value] ??
      formatNumber(latent.interestingness);
    link.append(html("span", { class: "value" }, value));
    return html("li", {}, link);
  }
  async function more(again = false) {
    if (reading && !again) return;
    reading?.abort();
    const mine = reading = new AbortController();
    const percent = (input) => (input.value === "" ? null : Number(input.value) / 100);
    const query = linkTo({
      sort: sort.value,
      ascending: sort.value === "latent" ? "true" : null,
      limit: STEP,
      offset: again ? 0 : list.children.length,
      alive: String(alive.checked),
      starred: starred.checked ? "true" : null,
      min_density: percent(least),
      max_density: percent(most),
      promotes: promotes.value,
      peaks: fires.value,
    }).slice(1);
    try {
      const page = await read(`${saePath(sae.name)}/latents?${query}`, mine.signal);
      total = page.total;
      if (again) {
        list.replaceChildren();
        list.scrollTop = 0;
      }
      list.append(...page.latents.map(row));
      status.textContent = `${total.toLocaleString("en")} of ${sae.n_latents.toLocaleString("en")} latents`;
      const shown = new URLSearchParams(location.hash.slice(1)).get("latent");
      mark(place, shown === null ? null : Number(shown));
    } catch (error) {
      if (error.name !== "AbortError") status.replaceChildren(problem(error));
    } finally {
      if (mine === reading) reading = null;
    }
  }
  list.addEventListener("scroll", () => {
    if (list.scrollTop + list.clientHeight > list.scrollHeight - 400 && list.children.length < total) more();
  });
  moveByArrows(list);
  for (const control of [sort, alive, starred, least, most, fires, promotes]) {
    control.addEventListener("change", () => more(true));
  }
  more(true);
}
