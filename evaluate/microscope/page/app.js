// The application: a page for each address, its navigation, and the line that says what the model and the search do.
import { read, run } from "./parts/api.js";
import { heading, linkTo, problem } from "./parts/controls.js";
import { showBrowser } from "./browse.js";
import { showCircuits } from "./circuits.js";
import { showCompare } from "./compare.js";
import { showNotes } from "./notes.js";
import { showOverview } from "./overview.js";
import { showSearch } from "./search.js";
import { showSteer } from "./steer.js";
import { showText } from "./text.js";

const PAGES = [
  ["overview", "Overview", showOverview],
  ["text", "Try text", showText],
  ["steer", "Steer", showSteer],
  ["compare", "Compare", showCompare],
  ["circuits", "Circuits", showCircuits],
  ["notes", "Notes", showNotes],
];
const main = document.getElementById("main");
const pages = document.getElementById("pages");
const box = document.getElementById("search-box");
const links = new Map(PAGES.map(([key, title]) => [key, html("a", { href: linkTo({ page: key }) }, title)]));
pages.append(...links.values());

let turn = 0;
async function follow() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const page = parameters.get("page") ?? (parameters.has("sae") ? "browse" : "overview");
  const mine = ++turn;
  hideTooltip();
  for (const [key, link] of links) {
    if (key === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (page !== "search") box.value = "";
  const show = page === "browse"
    ? showBrowser
    : page === "search"
    ? showSearch
    : PAGES.find(([key]) => key === page)?.[2];
  const place = html("div", { class: "view" });
  try {
    if (!show) throw new Error("There is no such page.");
    const known = await run();
    document.title = `${known.run} · Microscope`;
    if (mine !== turn) return;
    const keeps = page === "browse" && main.firstElementChild?.dataset.sae === parameters.get("sae");
    if (!keeps) main.replaceChildren(place);
    await show(keeps ? main.firstElementChild : place, parameters, known, () => mine === turn);
  } catch (error) {
    if (mine === turn) main.replaceChildren(heading("Not shown"), problem(error));
  }
  // A latent's heading has the focus already; a search keeps it in its box.
  if (mine === turn && page !== "search" && !parameters.has("latent")) {
    main.querySelector(".page-heading")?.focus({ preventScroll: page === "browse" });
  }
}

document.getElementById("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const sae = new URLSearchParams(location.hash.slice(1)).get("in");
  if (box.value.trim()) location.hash = linkTo({ page: "search", q: box.value, in: sae });
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.closest("input, textarea, select")) return;
  event.preventDefault();
  box.focus();
});

const status = document.getElementById("status");
async function showStatus() {
  let wait = 15000;
  try {
    const { model, search } = await read("/api/status");
    const said = {
      loading: "Loading the model…",
      ready: `Model ${model.name ?? ""} ready`,
      missing: `No model: ${model.reason}`,
    }[model.state];
    const queue = model.waiting ? `, ${model.waiting} waiting` : model.running ? ", at work" : "";
    const words = search.words < 1 ? `reading the indexes, ${Math.round(100 * search.words)}%` : "";
    const meaning = search.encoder && search.meaning < 1
      ? `embedding latents, ${Math.round(100 * search.meaning)}%`
      : "";
    const text = [said + queue, words || search.note || meaning].filter(Boolean).join(" · ");
    if (status.textContent !== text) status.textContent = text;
    if (model.state === "loading" || model.running || words || meaning) wait = 2000;
  } catch (error) {
    status.textContent = error.message;
  }
  setTimeout(showStatus, wait);
}

addEventListener("hashchange", follow);
follow();
showStatus();
