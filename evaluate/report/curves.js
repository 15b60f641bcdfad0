// Training curves: one quantity of all SAEs against tokens, with a cross-hair that shows the values.
// Explained variance comes first because, unlike losses, it is comparable across architectures.
const CURVE_TITLES = {
  explained_variance: "Explained variance",
  loss: "Loss",
  mse_loss: "MSE loss",
  l0: "L0",
  dead_fraction: "Dead fraction",
  lr: "Learning rate",
  tokens_per_second: "Tokens per second",
};
const DASHES = [null, "7 3", "2 3", "9 3 2 3"];

function curveStyle(saes, name) {
  const sae = saes.find((other) => other.name === name);
  if (!sae) return { colour: "var(--soft)", dash: null, label: name };
  const architectures = [...new Set(saes.map((other) => other.architecture))];
  const hooks = hooksOf(saes);
  const family = saes.filter((other) => other.architecture === sae.architecture);
  const shade = family.length > 1 ? family.indexOf(sae) / (family.length - 1) : 0.5;
  const base = colourOf(architectures.indexOf(sae.architecture));
  const colour = shade <= 0.5
    ? `color-mix(in oklab, ${base} ${55 + 90 * shade}%, var(--card))`
    : `color-mix(in oklab, ${base} ${140 - 80 * shade}%, var(--ink))`;
  return { colour, dash: DASHES[hooks.indexOf(sae.hook_point) % DASHES.length], label: sae.label };
}

function spreadLabels(ends, gap, top, bottom) {
  ends.sort((a, b) => a.y - b.y);
  ends.forEach((end, i) => {
    end.at = Math.max(i ? ends[i - 1].at + gap : top, end.y);
  });
  for (let i = ends.length - 1; i >= 0; i--) {
    ends[i].at = Math.min(ends[i].at, i + 1 < ends.length ? ends[i + 1].at - gap : bottom);
  }
}

function nearestIndex(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return value - sorted[low] <= sorted[high] - value ? low : high;
}

function drawCurves(width, height, curves, key, log, status) {
  const lines = curves.filter((curve) => !curve.hidden && curve.columns[key]);
  const axis = lines.every((curve) => curve.columns.tokens) ? "tokens" : "step";
  const title = CURVE_TITLES[key] ?? key.replaceAll("_", " ");
  for (const line of lines) {
    line.points = line.columns[key]
      .map((value, i) => [line.columns[axis]?.[i] ?? i, value])
      .filter(([at, value]) => isNumber(at) && isNumber(value) && (!log || value > 0));
  }
  const all = lines.flatMap((line) => line.points);
  const root = svg("svg", { width, height, role: "img", tabindex: 0 });
  root.setAttribute(
    "aria-label",
    `${title} during training. ${
      lines
        .filter((line) => line.points.length)
        .map((line) => `${line.name} ends at ${formatNumber(line.points.at(-1)[1])}`)
        .join("; ")
    }. Arrow keys read the values.`,
  );
  if (!all.length) {
    root.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "Nothing to show."));
    return root;
  }
  const named = width > 620 && lines.length <= 24;
  const longest = Math.max(...lines.map((line) => line.style.label.length));
  const frame = {
    left: 0,
    right: width - (named ? 22 + Math.min(24, longest) * 6.6 : 10),
    top: 30,
    bottom: height - 46,
  };
  const y = makeScale(
    all.map((point) => point[1]),
    frame.bottom,
    frame.top,
    { log, room: 0.04 },
  );
  frame.left = leftMargin(y);
  const x = makeScale(
    all.map((point) => point[0]),
    frame.left,
    frame.right,
    { room: 0, count: width < 420 ? 3 : 6 },
  );
  root.append(
    drawAxes(frame, x, y, axis === "tokens" ? "Tokens trained on" : "Step", log ? `${title} (log scale)` : title),
  );
  const ends = [];
  for (const line of lines.filter((other) => other.points.length)) {
    const d = `M${line.points.map(([at, value]) => `${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("L")}`;
    root.append(
      svg("path", {
        class: "curve",
        d,
        "data-sae": line.name,
        "stroke-dasharray": line.style.dash,
        style: `stroke: ${line.style.colour}`,
      }),
    );
    const [at, value] = line.points.at(-1);
    ends.push({ line, x: x(at), y: y(value) });
  }
  spreadLabels(ends, 15, frame.top, frame.bottom);
  if (named) {
    for (const end of ends) {
      const group = svg("g", { class: "line-end", "data-sae": end.line.name, "aria-hidden": "true" });
      group.append(
        svg("path", {
          d: `M${end.x + 2} ${end.y}L${frame.right + 14} ${end.at}`,
          style: `stroke: ${end.line.style.colour}`,
          fill: "none",
          "stroke-width": 1,
        }),
      );
      group.append(svg("text", { class: "point-label", x: frame.right + 18, y: end.at + 4 }, end.line.style.label));
      root.append(group);
    }
  }
  addCrossHair(root, frame, x, y, lines, axis, status);
  return root;
}

function addCrossHair(root, frame, x, y, lines, axis, status) {
  const cross = svg("g", { visibility: "hidden" });
  const rule = svg("line", { class: "cross", y1: frame.top, y2: frame.bottom });
  cross.append(rule);
  root.append(cross);
  const grid = lines.reduce((best, line) => (line.points.length > best.length ? line.points : best), []).map((point) =>
    point[0]
  );
  let index = grid.length - 1;
  const show = (i, clientX, clientY) => {
    index = Math.max(0, Math.min(grid.length - 1, i));
    const at = grid[index];
    rule.setAttribute("x1", x(at));
    rule.setAttribute("x2", x(at));
    cross.replaceChildren(rule);
    const rows = [];
    for (const line of lines) {
      if (!line.points.length) continue;
      const point = line.points[
        nearestIndex(
          line.points.map((other) => other[0]),
          at,
        )
      ];
      rows.push([point[1], line.name]);
      cross.append(
        svg("circle", {
          cx: x(point[0]),
          cy: y(point[1]),
          r: 3.5,
          style: `fill: ${line.style.colour}; pointer-events: none`,
        }),
      );
    }
    cross.setAttribute("visibility", "visible");
    const text = `${formatTick(at, false)} ${axis}\n${
      rows
        .sort((a, b) => b[0] - a[0])
        .map(([value, name]) => `${formatNumber(value)}  ${name}`)
        .join("\n")
    }`;
    const box = root.getBoundingClientRect();
    showTooltip(text, clientX ?? box.left + x(at), clientY ?? box.top + frame.top);
    return text;
  };
  const hide = () => {
    cross.setAttribute("visibility", "hidden");
    hideTooltip();
  };
  root.addEventListener(
    "pointermove",
    (event) =>
      show(
        nearestIndex(grid, x.invert(event.clientX - root.getBoundingClientRect().left)),
        event.clientX,
        event.clientY,
      ),
  );
  root.addEventListener("pointerleave", hide);
  root.addEventListener("blur", hide);
  root.addEventListener("keydown", (event) => {
    const stride =
      { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity }[event.key];
    if (!stride) return;
    event.preventDefault();
    status.textContent = show(Number.isFinite(stride) ? index + stride : stride > 0 ? grid.length - 1 : 0);
  });
}

function setUpCurves(saes, data) {
  const section = document.getElementById("curves");
  const curves = Object.entries(data).map(([name, columns]) => ({
    name,
    columns,
    hidden: false,
    style: curveStyle(saes, name),
  }));
  if (!curves.length) {
    section.querySelector("figure").replaceChildren(
      html("p", { class: "empty" }, "No training log was found beside these SAEs."),
    );
    return;
  }
  const keys = [...new Set(curves.flatMap((curve) => Object.keys(curve.columns)))].filter(
    (key) => !["step", "tokens", "time"].includes(key),
  );
  const rank = (key) => {
    const at = Object.keys(CURVE_TITLES).indexOf(key);
    return at < 0 ? 99 : at;
  };
  keys.sort((a, b) => rank(a) - rank(b));
  const container = document.getElementById("curves-chart");
  const status = html("p", { class: "hidden", role: "status" });
  container.after(status);
  const log = html("input", { type: "checkbox", id: "curves-log" });
  const select = html(
    "select",
    { id: "curves-key" },
    ...keys.map((key) => html("option", { value: key }, CURVE_TITLES[key] ?? key.replaceAll("_", " "))),
  );
  const wantsLog = (key) => {
    const values = curves.flatMap((curve) => curve.columns[key] ?? []).filter(isNumber);
    return /loss|l0/.test(key) && Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 5;
  };
  log.checked = wantsLog(keys[0]);
  const redraw = drawResponsive(
    container,
    (width, height) => drawCurves(width, height, curves, select.value, log.checked, status),
  );
  const caption = () => {
    document.getElementById("curves-caption").textContent = `${select.selectedOptions[0].textContent} during training`;
  };
  caption();
  select.addEventListener("change", () => {
    log.checked = wantsLog(select.value);
    caption();
    redraw();
  });
  log.addEventListener("change", redraw);
  document
    .getElementById("curves-controls")
    .append(html("label", { class: "field" }, "Show", select), html("label", { class: "field" }, log, "Log scale"));
  document.getElementById("curves-legend").append(
    ...curves.map((curve) => {
      const swatch = svg(
        "svg",
        { width: 26, height: 10, "aria-hidden": "true" },
        svg("line", {
          x1: 0,
          x2: 26,
          y1: 5,
          y2: 5,
          "stroke-width": 2.5,
          "stroke-dasharray": curve.style.dash,
          style: `stroke: ${curve.style.colour}`,
        }),
      );
      const button = html("button", { type: "button", "aria-pressed": "true" }, swatch, curve.name);
      button.addEventListener("click", () => {
        curve.hidden = !curve.hidden;
        button.setAttribute("aria-pressed", String(!curve.hidden));
        redraw();
      });
      lightOnHover(button, curve.name);
      return html("li", {}, button);
    }),
  );
}
