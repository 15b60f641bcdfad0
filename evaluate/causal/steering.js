// Curves of effect and damage against strength, and the texts of one strength.
const found = JSON.parse(document.getElementById("data").textContent);
const QUANTITIES = [
  ["effect", "Effect: log-probability of the concept (nats)", false],
  ["perplexity", "Damage: perplexity of the texts for the clean model", true],
  ["kl", "Damage: KL from the clean run (nats per token)", false],
];

function drawCurve(width, height, key, log, title) {
  const own = found.points.filter((point) => !point.is_random && isNumber(point[key]));
  const others = found.points.filter((point) => point.is_random && isNumber(point[key]));
  const root = svg("svg", { width, height, role: "img", "aria-label": title });
  const frame = { left: 0, right: width - 10, top: 26, bottom: height - 46 };
  const y = makeScale(
    [...own, ...others].map((point) => point[key]),
    frame.bottom,
    frame.top,
    { log },
  );
  frame.left = leftMargin(y);
  const x = makeScale(
    found.points.map((point) => point.strength),
    frame.left,
    frame.right,
    { room: 0.04, count: width < 420 ? 4 : 6 },
  );
  root.append(drawAxes(frame, x, y, "Strength", log ? "log scale" : ""));
  for (const point of others) {
    root.append(svg("circle", { class: "random", cx: x(point.strength), cy: y(point[key]), r: 2.5 }));
  }
  const line = (points) => `M${points.map(([at, value]) => `${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("L")}`;
  const means = (found.baseline[key] ?? []).map((row) => [row.strength, row.mean]);
  if (means.length) root.append(svg("path", { class: "mean", d: line(means.sort((a, b) => a[0] - b[0])) }));
  const sorted = [...own].sort((a, b) => a.strength - b.strength);
  root.append(svg("path", { class: "own", d: line(sorted.map((point) => [point.strength, point[key]])) }));
  for (const point of sorted) {
    const dot = svg("circle", { class: "dot", cx: x(point.strength), cy: y(point[key]), r: 5, tabindex: 0 });
    const random = found.baseline[key]?.find((row) => row.strength === point.strength);
    describe(
      dot,
      () =>
        `strength ${point.strength}\n${formatNumber(point[key])}${
          random ? `\nrandom latents ${formatNumber(random.mean)}` : ""
        }`,
    );
    root.append(dot);
  }
  return root;
}

for (const [key, title, log] of QUANTITIES) {
  if (!found.points.some((point) => !point.is_random && isNumber(point[key]))) continue;
  const chart = html("div", { class: "chart" });
  document.getElementById("curves").append(html("figure", {}, html("figcaption", {}, title), chart));
  drawResponsive(chart, (width, height) => drawCurve(width, height, key, log, title))();
}

const strengths = [...new Set(found.texts.map((text) => text.strength))];
const select = html(
  "select",
  {},
  ...strengths.map((strength) => html("option", { value: strength }, String(strength))),
);
function showTexts() {
  const some = found.texts.filter((text) => String(text.strength) === select.value);
  document.getElementById("texts").replaceChildren(
    ...some.map((text) =>
      html(
        "li",
        { class: "context" },
        html("p", { class: "context-head" }, text.prompt),
        html("p", { class: "context-text", dir: "auto" }, text.text || "(nothing)"),
      )
    ),
  );
}
select.value = String(strengths.at(-1));
select.addEventListener("change", showTexts);
document.getElementById("texts-controls").append(html("label", { class: "field" }, "Strength", select));
showTexts();
