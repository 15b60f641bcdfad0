// The kept nodes of a graph by layer and token, the edges of the chosen one, and the edges that were checked.
// `linkOf(layer, latent)` gives the address of a latent's page, or null if it has none.
function drawGraph({ graph, n_layers: nLayers, summary }, linkOf = () => null) {
  const tokens = graph.metadata.prompt_tokens;
  const signed = (value) => (isNumber(value) ? `${value < 0 ? "−" : "+"}${formatNumber(Math.abs(value))}` : "–");
  const tone = (value) => (value < 0 ? "against" : "for");
  const shownText = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
  const layerOf = (
    node,
  ) => (node.feature_type === "embedding" ? -1 : node.feature_type === "logit" ? nLayers : Number(node.layer));
  const isLogit = (node) => node.feature_type === "logit";
  const isError = (node) => node.feature_type === "mlp reconstruction error";

  const nodes = new Map(
    graph.nodes.map((node) => [node.node_id, { ...node, row: layerOf(node), inputs: [], outputs: [] }]),
  );
  for (const link of graph.links) {
    nodes.get(link.source).outputs.push({ node: nodes.get(link.target), weight: link.weight });
    nodes.get(link.target).inputs.push({ node: nodes.get(link.source), weight: link.weight });
  }
  const bySize = (a, b) => Math.abs(b.weight) - Math.abs(a.weight);
  for (const node of nodes.values()) [node.inputs, node.outputs].forEach((edges) => edges.sort(bySize));
  const logitText = (node) => node.clerp.match(/^Output "([\s\S]*)" \(p=/)?.[1] ?? node.clerp;

  function nameOf(node) {
    if (isLogit(node)) return `logit “${shownText(logitText(node))}”`;
    if (node.feature_type === "embedding") return `token “${shownText(tokens[node.ctx_idx])}”`;
    if (isError(node)) return `error of layer ${node.row}`;
    return `layer ${node.row}, latent ${node.node_id.split("_")[1]}`;
  }
  const placeOf = (
    node,
  ) => (isLogit(node)
    ? `probability ${(100 * node.token_prob).toFixed(1)}%`
    : `at token ${node.ctx_idx} “${shownText(tokens[node.ctx_idx])}”`);
  const about = (node) =>
    [
      nameOf(node),
      placeOf(node),
      node.activation === null ? "" : `activation ${formatNumber(node.activation)}`,
      isLogit(node) ? "" : node.clerp,
    ].filter(Boolean);

  // Where nodes are: rows of layers, columns of tokens, and a small grid in each cell.
  const STEP = 17, SIDE = 3, PAD = 16, LEFT = 8, NAMES = 62, FOOT = 26;
  const cells = new Map();
  for (const node of nodes.values()) {
    const key = `${node.row} ${node.ctx_idx}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(node);
  }
  for (const cell of cells.values()) cell.sort((a, b) => (a.influence ?? 0) - (b.influence ?? 0));
  const sides = tokens.map((_, column) =>
    Math.max(
      1,
      ...[...cells].filter(([key]) => key.endsWith(` ${column}`)).map(([, cell]) =>
        Math.min(cell.length, cell.length > 9 ? 6 : SIDE)
      ),
    )
  );
  const texts = tokens.map(shownText);
  const widths = sides.map((side, i) => Math.max(side * STEP + PAD, Math.min(texts[i].length, 12) * 7.6 + PAD));
  const lefts = widths.map((_, i) => LEFT + widths.slice(0, i).reduce((a, b) => a + b, 0));
  const rowHeights = Array.from(
    { length: nLayers + 2 },
    (_, r) =>
      Math.max(
          1,
          ...tokens.map((_, column) => Math.ceil((cells.get(`${r - 1} ${column}`)?.length ?? 0) / sides[column])),
        ) * STEP + PAD,
  );
  const width = lefts.at(-1) + widths.at(-1);
  const height = rowHeights.reduce((a, b) => a + b, 0) + FOOT;
  const bottoms = rowHeights.map((_, r) => height - FOOT - rowHeights.slice(0, r).reduce((a, b) => a + b, 0));
  for (const [key, cell] of cells) {
    const [row, column] = key.split(" ").map(Number), side = sides[column];
    cell.forEach((node, i) => {
      const inRow = Math.min(side, cell.length - Math.floor(i / side) * side);
      node.x = lefts[column] + widths[column] / 2 + ((i % side) - (inRow - 1) / 2) * STEP;
      node.y = bottoms[row + 1] - PAD / 2 - STEP / 2 - Math.floor(i / side) * STEP;
    });
  }

  const links = svg("g", {});
  const drawing = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "presentation" });
  const names = svg("svg", {
    class: "layer-names",
    width: NAMES,
    height,
    viewBox: `0 0 ${NAMES} ${height}`,
    role: "presentation",
  });
  rowHeights.forEach((_, r) => {
    const name = r === 0 ? "tokens" : r === nLayers + 1 ? "logits" : `layer ${r - 1}`;
    drawing.append(svg("line", { class: "row-line", x1: 0, x2: width, y1: bottoms[r], y2: bottoms[r] }));
    names.append(svg("text", { class: "layer-name", x: 12, y: bottoms[r] - rowHeights[r] / 2 + 4 }, name));
  });
  texts.forEach((text, i) => {
    const name = text.length > 12 ? `${text.slice(0, 11)}…` : text;
    drawing.append(
      svg("text", { class: "token-name", "text-anchor": "middle", x: lefts[i] + widths[i] / 2, y: height - 8 }, name),
    );
  });
  drawing.append(links);
  function markOf(node) {
    const { x, y } = node;
    if (isError(node)) {
      return svg("path", { class: "node error", d: `M${x} ${y - 6} ${x + 6} ${y} ${x} ${y + 6} ${x - 6} ${y}Z` });
    }
    if (node.feature_type.startsWith("cross")) return svg("circle", { class: "node", cx: x, cy: y, r: 5 });
    return svg("rect", { class: "node", x: x - 5, y: y - 5, width: 10, height: 10 });
  }
  for (const node of nodes.values()) {
    const ring = svg("circle", { class: "ring", cx: node.x, cy: node.y, r: 9 });
    const hit = svg("circle", { cx: node.x, cy: node.y, r: STEP / 2, fill: "transparent" });
    node.place = svg(
      "g",
      { class: "place", role: "button", tabindex: -1, "data-node": node.node_id, "aria-label": about(node).join(", ") },
      hit,
      ring,
      markOf(node),
    );
    describe(node.place, () => about(node).join("\n"));
    node.place.addEventListener("click", () => choose(node));
    node.place.addEventListener("keydown", (event) => move(event, node));
    drawing.append(node.place);
  }
  document.getElementById("graph").append(names, drawing);

  function move(event, node) {
    const all = [...nodes.values()];
    const nearest = (some) =>
      some.sort((a, b) =>
        Math.hypot(a.x - node.x, (a.y - node.y) / 4) - Math.hypot(b.x - node.x, (b.y - node.y) / 4)
      )[0];
    const row = all.filter((other) => other.row === node.row).sort((a, b) => a.x - b.x || a.y - b.y);
    const rows = [...new Set(all.map((other) => other.row))].sort((a, b) => a - b);
    const beside = (step) => nearest(all.filter((other) => other.row === rows[rows.indexOf(node.row) + step]));
    const next = {
      ArrowLeft: () => row[row.indexOf(node) - 1],
      ArrowRight: () => row[row.indexOf(node) + 1],
      ArrowUp: () => beside(1),
      ArrowDown: () => beside(-1),
      Enter: () => node,
      " ": () => node,
    }[event.key]?.();
    if (!next) return;
    event.preventDefault();
    choose(next);
    next.place.focus();
  }

  const choice = document.getElementById("shown");
  for (const n of [10, 20, 50, 1000]) {
    choice.append(html("option", { value: n }, n === 1000 ? "all" : `${n} strongest`));
  }
  choice.value = 20;
  choice.addEventListener("change", () => choose(chosen));
  let chosen = [...nodes.values()].find((node) => node.is_target_logit);

  function choose(node) {
    chosen = node;
    const n = Number(choice.value), inputs = node.inputs.slice(0, n), outputs = node.outputs.slice(0, n);
    const largest = Math.max(...[...inputs, ...outputs].map((edge) => Math.abs(edge.weight)), 1e-30);
    const near = new Map([...inputs, ...outputs].map((edge) => [edge.node, edge.weight]));
    for (const other of nodes.values()) {
      const state = other === node ? "chosen" : !near.has(other) ? "far" : near.get(other) < 0 ? "lowered" : "raised";
      other.place.setAttribute("class", `place ${state}`);
      other.place.setAttribute("tabindex", other === node ? 0 : -1);
      other.place.setAttribute("aria-pressed", other === node);
    }
    links.replaceChildren(
      ...[
        ...inputs.map((edge) => [edge.node, node, edge.weight]),
        ...outputs.map((edge) => [node, edge.node, edge.weight]),
      ].reverse().map(([from, to, weight]) =>
        svg("path", {
          class: `link ${tone(weight)}`,
          "stroke-width": (0.75 + 4 * Math.abs(weight) / largest).toFixed(2),
          d: `M${from.x} ${from.y} C${from.x} ${(from.y + to.y) / 2} ${to.x} ${(from.y + to.y) / 2} ${to.x} ${to.y}`,
        })
      ),
    );
    document.getElementById("node-note").textContent = `${about(node).join("; ")}.`;
    const address = node.activation === null ? null : linkOf(node.row, Number(node.node_id.split("_")[1]));
    if (address) document.getElementById("node-note").append(" ", html("a", { href: address }, "Look at this latent"));
    list("from", inputs, node.inputs.length, largest);
    list("to", outputs, node.outputs.length, largest);
  }

  function list(id, edges, total, largest) {
    const rows = edges.map((edge) => {
      const [name, ...rest] = about(edge.node);
      const button = html(
        "button",
        {
          type: "button",
          class: tone(edge.weight),
          style: `--share: ${((100 * Math.abs(edge.weight)) / largest).toFixed(1)}%`,
        },
        html("span", { class: "what" }, name, " ", html("small", {}, rest.join(", "))),
        html("span", { class: "weight" }, signed(edge.weight)),
      );
      button.addEventListener("click", () => {
        choose(edge.node);
        edge.node.place.scrollIntoView({ block: "nearest", inline: "center" });
      });
      return html("li", {}, button);
    });
    if (total > edges.length) rows.push(html("li", { class: "empty" }, `${edges.length} of ${total} edges`));
    document.getElementById(id).replaceChildren(
      ...(rows.length ? rows : [html("li", { class: "empty" }, "No kept edge.")]),
    );
  }

  for (const row of summary.verified ?? []) {
    const names = [row.source, row.target].map((id) => nodes.get(id)).map((node) =>
      `${nameOf(node)} ${isLogit(node) ? "" : `@${node.ctx_idx}`}`.trim()
    );
    document.getElementById("verified").append(
      html(
        "tr",
        {},
        html("th", { scope: "row", class: "text" }, names.join(" → ")),
        ...["direct", "direct_measured", "total", "total_frozen", "total_measured"].map((key) =>
          html("td", {}, signed(row[key]))
        ),
      ),
    );
  }
  choose(chosen);
  const box = document.getElementById("graph");
  box.scrollLeft = NAMES + chosen.x - box.clientWidth / 2;
}

const graphData = document.getElementById("data");
if (graphData) drawGraph(JSON.parse(graphData.textContent));
