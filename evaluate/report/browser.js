// The feature browser: one page per SAE, addressed by the URL fragment, with a searchable, sortable list of latents.
const LIST_STEP = 80;

function readRoute() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const latent = parts.get("latent");
  return parts.has("sae")
    ? { sae: parts.get("sae"), latent: latent === null || !/^\d+$/.test(latent) ? null : Number(latent) }
    : null;
}

const routeTo = (sae, latent = null) => `#${new URLSearchParams(latent === null ? { sae } : { sae, latent })}`;

// Normalise text for comparison: lower case, and composed, because a letter can be written as several code points.
const folded = (text) => text.normalize("NFC").toLowerCase();

function searchTexts(summary, names) {
  const text = (ids) => ids.map((id) => tokenText(names, id)).join(" ");
  return summary.peaks.map((ids, i) => folded(`${text(ids)} ${text(summary.promoted[i])}`));
}

// Return the text of every context that the page shows for a latent.
const searchedContexts = (latent, names) =>
  [...latent.top, ...latent.sampled].map((entry) => folded(contextTexts(entry, names).join("")));

// Parse a query: a latent's number, or text. In quotation marks, digits are text and outer spaces are significant.
function readQuery(query) {
  const quoted = query.match(/^\s*"(.+)"\s*$/)?.[1];
  const text = folded(quoted ?? query.trim());
  return { text, number: quoted === undefined && /^#?\d+$/.test(text) ? Number(text.replace("#", "")) : null };
}

// Return the latents that match the query, sorted. A number matches one latent; text matches a latent's tokens.
// `reading` contains the latents whose contexts match.
function selectLatents(summary, texts, query, sort, alive, reading) {
  const { text: wanted, number } = readQuery(query);
  const chosen = [];
  for (let i = 0; i < texts.length; i++) {
    if (
      i === number || ((!alive || summary.density[i] > 0) && (!wanted || texts[i].includes(wanted) || reading.has(i)))
    ) chosen.push(i);
  }
  const column = { interestingness: summary.score, density: summary.density, max: summary.max }[sort];
  chosen.sort((a, b) => (b === number) - (a === number) || (column ? column[b] - column[a] : 0) || a - b);
  return chosen;
}

function setUpBrowser(saes, catalogue) {
  const find = (id) => document.getElementById(`browser-${id}`);
  const [page, list, status, article, search, sort, alive, picker] = [
    "page",
    "list",
    "status",
    "latent",
    "search",
    "sort",
    "alive",
    "sae",
  ].map(find);
  let current = null;
  let shown = [];
  let active = null;
  let reading = new Set();
  let searches = 0;

  picker.append(...Object.keys(catalogue.saes).map((name) => html("option", { value: name }, name)));
  picker.addEventListener("change", () => {
    location.hash = routeTo(picker.value);
  });

  function row(number) {
    const { summary, names, sae } = current;
    const link = html(
      "a",
      { href: routeTo(sae, number), "data-latent": number },
      html("span", { class: "number" }, String(number)),
      html("span", { class: "peaks" }, ...summary.peaks[number].slice(0, 3).map((id) => tokenChip(names, id))),
    );
    const value = {
      density: `${formatNumber(100 * summary.density[number])}%`,
      max: formatNumber(summary.max[number]),
    }[sort.value] ??
      summary.score[number].toFixed(2);
    link.append(html("span", { class: "value" }, value));
    if (number === active) link.setAttribute("aria-current", "true");
    return html("li", {}, link);
  }

  const more = () => list.append(...shown.slice(list.children.length, list.children.length + LIST_STEP).map(row));
  list.addEventListener("scroll", () => {
    if (list.scrollTop + list.clientHeight > list.scrollHeight - 400) more();
  });
  moveByArrows(list);

  const showStatus = (progress = "") => {
    status.textContent = `${shown.length.toLocaleString("en")} of ${
      current.texts.length.toLocaleString("en")
    } latents${progress}`;
  };

  function fill() {
    if (!current) return;
    shown = selectLatents(current.summary, current.texts, search.value, sort.value, alive.checked, reading);
    list.replaceChildren();
    list.scrollTop = 0;
    more();
    showStatus();
  }

  // Also search the text of the contexts, block by block, until the query changes.
  async function readContexts() {
    const { entry, names, sae } = current;
    const mine = ++searches;
    const { text: wanted, number: latentNumber } = readQuery(search.value);
    reading = new Set();
    fill();
    if (!wanted || latentNumber !== null) return;
    const found = new Set();
    const n = Math.ceil(entry.n / entry.size);
    for (let number = 0; number < n; number++) {
      const block = await loadBlock(`${entry.prefix}-${number}`, catalogue.folder);
      if (mine !== searches || current.sae !== sae) return;
      block.forEach(
        (latent, i) =>
          searchedContexts(latent, names).some((text) => text.includes(wanted)) && found.add(number * entry.size + i),
      );
      if (number % 8 === 7) {
        showStatus(`, reading contexts: ${Math.round((100 * number) / n)}%`);
        await new Promise((done) => setTimeout(done));
      }
    }
    reading = found;
    if (list.scrollTop === 0) return fill();
    const before = new Set(shown);
    shown = shown.concat(
      selectLatents(current.summary, current.texts, search.value, sort.value, alive.checked, reading).filter((i) =>
        !before.has(i)
      ),
    );
    showStatus();
  }
  search.addEventListener(
    "input",
    () =>
      current &&
      readContexts().catch((error) => {
        status.textContent = error.message;
      }),
  );
  sort.addEventListener("change", fill);
  alive.addEventListener("change", fill);
  search.addEventListener(
    "keydown",
    (event) => event.key === "Enter" && shown.length && (location.hash = routeTo(current.sae, shown[0])),
  );

  async function openSae(name) {
    const entry = catalogue.saes[name];
    const [names, summary] = await Promise.all([
      loadBlock(catalogue.names, catalogue.folder),
      loadBlock(`${entry.prefix}-summary`, catalogue.folder),
    ]);
    current = { sae: name, entry, names, summary, texts: searchTexts(summary, names) };
    picker.value = name;
    find("heading").textContent = name;
    find("about").textContent = `${entry.n.toLocaleString("en")} latents, indexed on ${
      entry.rows.toLocaleString("en")
    } tokens.`;
    search.value = "";
    reading = new Set();
    searches += 1;
    fill();
  }

  function drawOverview(name) {
    const sae = saes.find((other) => other.name === name);
    article.replaceChildren(html("p", { class: "empty" }, "Choose a latent to see what it responds to."));
    if (!sae) return;
    const facts = [
      ["Explained variance", sae.explained_variance],
      ["L0", sae.l0],
      ["CE loss score", sae.ce_loss_score],
      ["Dead", isNumber(sae.dead_fraction) ? `${(100 * sae.dead_fraction).toFixed(1)}%` : null],
    ];
    article.append(
      html(
        "dl",
        { class: "figures" },
        ...facts.map(([key, value]) => fact(key, typeof value === "string" ? value : formatNumber(value))),
      ),
    );
    if (!sae.density?.counts?.some((count) => count > 0)) return;
    const chart = html("div", { class: "chart" });
    const used = sae.density.counts.map((count, i) => (count > 0 ? i : -1)).filter((i) => i >= 0);
    const part = {
      counts: sae.density.counts.slice(used[0], used.at(-1) + 1),
      edges: sae.density.edges.slice(used[0], used.at(-1) + 2),
    };
    article.append(html("div", { class: "panels wide" }, html("div", {}, html("h4", {}, "Latent densities"), chart)));
    drawResponsive(chart, (width, height) =>
      drawHistogram(width, height, part, {
        label: `Histogram of the latent densities of ${name}`,
        xTitle: "Density",
        colour: "var(--a0)",
        tick: powerOfTen,
      }))();
  }

  async function openLatent(number) {
    const { entry, summary, names, sae } = current;
    const block = await loadBlock(`${entry.prefix}-${Math.floor(number / entry.size)}`, catalogue.folder);
    if (active !== number || current.sae !== sae) return;
    const heading = drawLatent(
      article,
      number,
      summary,
      block[number % entry.size],
      names,
      (other) => routeTo(sae, other),
      entry.n,
    );
    heading.focus({ preventScroll: true });
    if (matchMedia("(max-width: 52rem)").matches) heading.scrollIntoView();
    else scrollTo(0, 0);
  }

  async function follow() {
    const route = readRoute();
    const known = route && Object.hasOwn(catalogue.saes, route.sae);
    document.body.classList.toggle("browsing", Boolean(known));
    page.hidden = !known;
    if (!known) return;
    try {
      if (current?.sae !== route.sae) await openSae(route.sae);
      active = route.latent !== null && route.latent < current.entry.n ? route.latent : null;
      for (const link of list.querySelectorAll("a")) {
        if (Number(link.dataset.latent) === active) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
      if (active === null) {
        drawOverview(route.sae);
        find("heading").focus({ preventScroll: true });
        scrollTo(0, 0);
      } else await openLatent(active);
    } catch (error) {
      article.replaceChildren(html("p", { class: "empty", role: "alert" }, error.message));
    }
  }

  article.addEventListener("pointerover", (event) => {
    const tip = event.target.dataset?.tip;
    if (tip) showTooltip(tip, event.clientX, event.clientY);
    else if (!event.target.closest("svg")) hideTooltip();
  });
  article.addEventListener("pointerleave", hideTooltip);
  addEventListener("hashchange", follow);
  for (const cell of document.querySelectorAll("#metrics tbody th")) {
    const name = cell.parentElement.dataset.sae;
    if (Object.hasOwn(catalogue.saes, name)) cell.replaceChildren(html("a", { href: routeTo(name) }, cell.textContent));
  }
  document
    .getElementById("features-list")
    .append(
      ...Object.entries(catalogue.saes).map(([name, entry]) =>
        html("li", {}, html("a", { href: routeTo(name) }, name), ` ${entry.n.toLocaleString("en")} latents`)
      ),
    );
  follow();
}
