// Plots of fidelity against L0: colour and shape by architecture, fill by hook point, labels that do not overlap.
const SHAPES = [
  (r) => `M0 ${-r}A${r} ${r} 0 1 1 0 ${r}A${r} ${r} 0 1 1 0 ${-r}Z`,
  (r) => `M0 ${-r * 1.25}L${r * 1.2} ${r * 0.85}H${-r * 1.2}Z`,
  (r) => `M${-r * 0.88} ${-r * 0.88}H${r * 0.88}V${r * 0.88}H${-r * 0.88}Z`,
  (r) => `M0 ${-r * 1.3}L${r * 1.3} 0L0 ${r * 1.3}L${-r * 1.3} 0Z`,
  (r) => `M0 ${r * 1.25}L${r * 1.2} ${-r * 0.85}H${-r * 1.2}Z`,
  (r) =>
    `M${-r} ${-r * 0.36}H${-r * 0.36}V${-r}H${r * 0.36}V${-r * 0.36}H${r}V${r * 0.36}H${r * 0.36}V${r}H${-r * 0.36}V${
      r * 0.36
    }H${-r}Z`,
  (r) => `M0 ${-r * 1.15}L${r} ${-r * 0.55}V${r * 0.55}L0 ${r * 1.15}L${-r} ${r * 0.55}V${-r * 0.55}Z`,
  (r) =>
    Array.from({ length: 10 }, (_, i) => {
      const [angle, size] = [(Math.PI * i) / 5, i % 2 ? r * 0.55 : r * 1.35];
      return `${i ? "L" : "M"}${(Math.sin(angle) * size).toFixed(2)} ${(-Math.cos(angle) * size).toFixed(2)}`;
    }).join("") + "Z",
];

const colourOf = (index) => `var(--a${index % 8})`;

function drawMark(architecture, hook, radius = 6) {
  const colour = colourOf(architecture);
  const fill = hook === 0 ? colour : hook === 1 ? "var(--card)" : `color-mix(in srgb, ${colour} 35%, var(--card))`;
  return svg("path", { class: "mark", d: SHAPES[architecture % SHAPES.length](radius), fill, stroke: colour });
}

// Return the Pareto-optimal points: each has higher fidelity than every sparser one.
function paretoFrontier(points) {
  let best = -Infinity;
  return [...points]
    .sort((a, b) => a.l0 - b.l0 || b.value - a.value)
    .filter((point) => {
      if (point.value <= best) return false;
      best = point.value;
      return true;
    });
}

// Return the hook points, the one with the most SAEs first; its marks are filled.
function hooksOf(saes) {
  const counts = new Map();
  for (const { hook_point } of saes) counts.set(hook_point, (counts.get(hook_point) ?? 0) + 1);
  return [...counts.keys()].sort((a, b) =>
    counts.get(b) - counts.get(a) || a.localeCompare(b, "en", { numeric: true })
  );
}

const overlap = (a, b) =>
  Math.max(0, Math.min(a.x1, b.x1) - Math.max(a.x0, b.x0)) * Math.max(0, Math.min(a.y1, b.y1) - Math.max(a.y0, b.y0));

// Place each label at the nearest of 36 positions that overlaps no mark, label, line or edge.
function placeLabels(points, lines, frame, measure) {
  const dots = lines.flatMap((line) =>
    line.slice(1).flatMap((end, i) =>
      Array.from({ length: 40 }, (_, step) => {
        const [x, y] = [
          line[i].px + ((end.px - line[i].px) * step) / 40,
          line[i].py + ((end.py - line[i].py) * step) / 40,
        ];
        return { x0: x - 1, x1: x + 1, y0: y - 1, y1: y + 1 };
      })
    )
  );
  const taken = points.map(({ px, py }) => ({ x0: px - 8, x1: px + 8, y0: py - 8, y1: py + 8 }));
  const directions = [
    [1, 0],
    [-1, 0],
    [0, -1],
    [0, 1],
    [1, -1],
    [-1, -1],
    [1, 1],
    [-1, 1],
    [0.5, -1],
    [-0.5, -1],
    [0.5, 1],
    [-0.5, 1],
  ];
  return points.map((point, own) => {
    const width = measure(point.label);
    let best = null;
    for (const distance of [12, 24, 40]) {
      for (const [dx, dy] of directions) {
        const middle = point.px + dx * distance + (dx * width) / 2;
        const y = point.py + dy * (distance + 4);
        const box = { x0: middle - width / 2, x1: middle + width / 2, y0: y - 8, y1: y + 8 };
        const outside = Math.max(0, frame.left - box.x0) +
          Math.max(0, box.x1 - frame.right) +
          Math.max(0, frame.top - 4 - box.y0) +
          Math.max(0, box.y1 - frame.bottom);
        const cost = taken.reduce((sum, other, i) => sum + (i === own ? 0 : overlap(box, other)), 0) * 10 +
          dots.reduce((sum, dot) => sum + overlap(box, dot), 0) * 2 +
          outside * 40 +
          distance;
        if (!best || cost < best.cost) best = { cost, box, middle, y, distance };
      }
    }
    taken.push(best.box);
    return best;
  });
}

function drawPareto(width, height, saes, key, title, { log, architectures, hooks }) {
  const points = saes
    .filter((sae) => isNumber(sae.l0) && isNumber(sae[key]) && (!log || sae.l0 > 0))
    .map((sae) => ({ ...sae, value: sae[key] }));
  const root = svg("svg", { width, height, role: "group", "aria-label": `${title} against L0, ${points.length} SAEs` });
  if (!points.length) {
    root.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "No SAE here has this metric."));
    return root;
  }
  const frame = { left: 0, right: width - 8, top: 30, bottom: height - 46 };
  const y = makeScale(
    points.flatMap((point) => [point.value, ...(point.intervals[key] ?? [])]),
    frame.bottom,
    frame.top,
    { room: 0.1 },
  );
  frame.left = leftMargin(y);
  const x = makeScale(
    points.map((point) => point.l0),
    frame.left,
    frame.right,
    { log, room: 0.1, count: width < 420 ? 4 : 6 },
  );
  root.append(
    drawAxes(frame, x, y, log ? "L0, latents active per token (log scale)" : "L0, latents active per token", title),
  );
  for (const point of points) [point.px, point.py] = [x(point.l0), y(point.value)];
  const lines = hooks.map((hook) => paretoFrontier(points.filter((point) => point.hook_point === hook)));
  for (const line of lines) {
    if (line.length > 1) {
      root.append(svg("path", { class: "frontier", d: `M${line.map(({ px, py }) => `${px} ${py}`).join("L")}` }));
    }
  }
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "12px system-ui, sans-serif";
  const places = placeLabels(points, lines, frame, (text) => pen.measureText(text).width + 4);
  points.forEach((point, i) => {
    const place = places[i];
    const group = svg("g", { "data-sae": point.name });
    if (place.distance > 12) {
      group.append(
        svg("line", {
          class: "leader",
          x1: point.px,
          y1: point.py,
          x2: Math.max(place.box.x0, Math.min(point.px, place.box.x1)),
          y2: Math.max(place.box.y0 + 2, Math.min(point.py, place.box.y1 - 2)),
        }),
      );
    }
    group.append(
      svg("text", {
        class: "point-label",
        x: place.middle,
        y: place.y + 4,
        "text-anchor": "middle",
        "aria-hidden": "true",
      }, point.label),
    );
    root.append(group);
  });
  for (const point of points) {
    const interval = point.intervals[key]?.map(formatNumber).join(" to ");
    const confidence = interval ? `\n95% confidence ${interval}` : "";
    const place = `${point.architecture} at ${point.hook_point}`;
    const text = `${point.name}\n${place}\nL0 ${formatNumber(point.l0)}, ${title.toLowerCase()} ${
      formatNumber(point.value)
    }${confidence}`;
    const group = svg("g", {
      "data-sae": point.name,
      transform: `translate(${point.px} ${point.py})`,
      tabindex: 0,
      role: "img",
      "aria-label": text.replaceAll("\n", ", "),
    });
    group.append(svg("circle", { r: 15, fill: "transparent" }), svg("circle", { class: "ring", r: 11 }));
    const bounds = point.intervals[key];
    if (bounds) {
      group.append(
        svg("path", {
          class: "interval",
          d: `M0 ${y(bounds[0]) - point.py}V${y(bounds[1]) - point.py}`,
          style: `stroke: ${colourOf(architectures.indexOf(point.architecture))}`,
        }),
      );
    }
    group.append(drawMark(architectures.indexOf(point.architecture), hooks.indexOf(point.hook_point)));
    describe(group, () => text);
    lightOnHover(group, point.name);
    root.append(group);
  }
  return root;
}

function drawLegend(list, architectures, hooks) {
  const key = (mark, text) =>
    html("li", {}, svg("svg", { width: 18, height: 18, viewBox: "-9 -9 18 18", "aria-hidden": "true" }, mark), text);
  list.replaceChildren(...architectures.map((name, i) => key(drawMark(i, 0), name)));
  const fillings = ["filled", "hollow", "tinted"];
  if (hooks.length > 1) hooks.forEach((hook, i) => list.append(html("li", {}, `${fillings[Math.min(i, 2)]}: ${hook}`)));
}

const USUAL = "explained_variance_without_outliers";

/** Where a hook point has no outliers, all of its rows are usual ones. */
function withUsualRows(sae) {
  const { explained_variance: value, intervals } = sae;
  return isNumber(sae[USUAL])
    ? sae
    : { ...sae, [USUAL]: value, intervals: { ...intervals, [USUAL]: intervals.explained_variance } };
}

function setUpPareto(saes) {
  const architectures = [...new Set(saes.map((sae) => sae.architecture))];
  const hooks = hooksOf(saes);
  const sizes = saes.map((sae) => sae.l0).filter((l0) => isNumber(l0) && l0 > 0);
  const state = { log: Math.max(...sizes) / Math.min(...sizes) > 6, architectures, hooks };
  const hasOutliers = saes.some((sae) => isNumber(sae[USUAL]));
  if (hasOutliers) saes = saes.map(withUsualRows);
  let shown = saes;
  const redraws = [
    hasOutliers
      ? ["pareto-variance", USUAL, "Explained variance, usual rows"]
      : ["pareto-variance", "explained_variance", "Explained variance"],
    ["pareto-loss", "ce_loss_score", "CE loss score"],
  ]
    .map(([id, key, title]) => [document.getElementById(id), key, title])
    .filter(([container]) => container)
    .map(([container, key, title]) =>
      drawResponsive(container, (width, height) => drawPareto(width, height, shown, key, title, state))
    );
  const controls = document.getElementById("pareto-controls");
  if (hooks.length > 1) {
    const select = html(
      "select",
      { id: "pareto-hook" },
      html("option", { value: "" }, "all"),
      ...hooks.map((hook) => html("option", { value: hook }, hook)),
    );
    select.addEventListener("change", () => {
      shown = saes.filter((sae) => !select.value || sae.hook_point === select.value);
      redraws.forEach((redraw) => redraw());
    });
    controls.append(html("label", { class: "field" }, "Hook point", select));
  }
  const log = html("input", { type: "checkbox", id: "pareto-log" });
  log.checked = state.log;
  log.addEventListener("change", () => {
    state.log = log.checked;
    redraws.forEach((redraw) => redraw());
  });
  controls.append(html("label", { class: "field" }, log, "Log scale"));
  drawLegend(document.getElementById("pareto-legend"), architectures, hooks);
}
