// The curve of strength against effect and damage: the latent's line, and random latents steered as strongly as dots.
const QUANTITIES = [
  ["kl", "Change: KL from the clean run (nats per token)", false],
  ["perplexity", "Damage: perplexity of the texts for the clean model", true],
];

export function drawStrengths(place, points) {
  const figures = QUANTITIES.map(([key, title, log]) => {
    const chart = html("div", { class: "chart" });
    drawResponsive(chart, (width, height) => drawOne(width, height, points, key, title, log));
    return html("figure", {}, html("figcaption", {}, title), chart);
  });
  const explained =
    "The line is the latent; dots are random latents at the same multiples. A strength is worth its damage where the line leaves the dots.";
  place.replaceChildren(
    html("h2", {}, "Strength"),
    html("p", { class: "note" }, explained),
    html("div", { class: "pair" }, ...figures),
  );
}

function drawOne(width, height, points, key, title, log) {
  const shown = points.filter((point) => isNumber(point[key]));
  const own = shown.filter((point) => !point.is_random).sort((a, b) => a.strength - b.strength);
  const root = svg("svg", {
    width,
    height,
    role: "img",
    "aria-label": `${title}: ${own.map((point) => `${point.strength}: ${formatNumber(point[key])}`).join(", ")}`,
  });
  if (!own.length) return root;
  const frame = { left: 0, right: width - 10, top: 26, bottom: height - 46 };
  const y = makeScale(shown.map((point) => point[key]), frame.bottom, frame.top, { log });
  frame.left = leftMargin(y);
  const x = makeScale(points.map((point) => point.strength), frame.left, frame.right, { room: 0.04, count: 5 });
  root.append(drawAxes(frame, x, y, "Strength", log ? "log scale" : ""));
  for (const point of shown.filter((one) => one.is_random)) {
    root.append(svg("circle", { class: "random", cx: x(point.strength), cy: y(point[key]), r: 3 }));
  }
  root.append(
    svg("path", { class: "own", d: `M${own.map((point) => `${x(point.strength)} ${y(point[key])}`).join("L")}` }),
  );
  for (const point of own) {
    const dot = svg("circle", { class: "dot", cx: x(point.strength), cy: y(point[key]), r: 5, tabindex: 0 });
    describe(dot, () => `strength ${point.strength}\n${formatNumber(point[key])}`);
    root.append(dot);
  }
  return root;
}
