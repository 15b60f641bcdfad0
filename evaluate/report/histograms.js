// Histograms, and the latent densities as small multiples with a shared log axis.
function drawHistogram(
  width,
  height,
  { edges, counts },
  {
    label,
    xTitle,
    yTitle = "Latents",
    colour,
    xEnds,
    yMax,
    tick = (value) => formatTick(value, false),
    unit = "latents",
  },
) {
  const root = svg("svg", { width, height, role: "img", "aria-label": label });
  const frame = { left: 0, right: width - 14, top: 26, bottom: height - 40 };
  const y = makeScale(counts, frame.bottom, frame.top, {
    room: 0,
    count: 3,
    ends: [0, Math.max(1, yMax ?? Math.max(...counts))],
  });
  frame.left = leftMargin(y);
  const x = makeScale(edges, frame.left, frame.right, {
    room: 0,
    count: Math.max(3, Math.min(6, Math.floor(width / 60))),
    ends: xEnds,
  });
  for (const value of y.ticks) {
    root.append(svg("line", { class: "grid", x1: frame.left, x2: frame.right, y1: y(value), y2: y(value) }));
    root.append(svg("text", { x: frame.left - 6, y: y(value) + 4, "text-anchor": "end" }, formatTick(value, false)));
  }
  for (const value of x.ticks) {
    root.append(svg("text", { x: x(value), y: frame.bottom + 16, "text-anchor": "middle" }, tick(value)));
  }
  root.append(
    svg("text", { class: "axis-title", x: 0, y: 12 }, yTitle),
    svg("text", { class: "axis-title", x: frame.right, y: frame.bottom + 34, "text-anchor": "end" }, xTitle),
  );
  counts.forEach((count, i) => {
    const [from, to] = [x(edges[i]), x(edges[i + 1])];
    const column = svg("g", {});
    column.append(
      svg("rect", {
        x: from,
        y: frame.top,
        width: Math.max(0, to - from),
        height: frame.bottom - frame.top,
        fill: "transparent",
      }),
    );
    if (count > 0) {
      const top = Math.min(y(count), frame.bottom - 1.5);
      column.append(
        svg("rect", {
          class: "bar",
          x: from + 0.5,
          y: top,
          width: Math.max(1, to - from - 1),
          height: frame.bottom - top,
          style: `--bar: ${colour}`,
        }),
      );
    }
    column.addEventListener(
      "pointermove",
      (event) =>
        showTooltip(
          `${count.toLocaleString("en")} ${unit}\n${tick(edges[i])} to ${tick(edges[i + 1])}`,
          event.clientX,
          event.clientY,
        ),
    );
    column.addEventListener("pointerleave", hideTooltip);
    root.append(column);
  });
  root.append(svg("line", { class: "base", x1: frame.left, x2: frame.right, y1: frame.bottom, y2: frame.bottom }));
  return root;
}

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
function powerOfTen(exponent) {
  if (!Number.isInteger(exponent)) return formatNumber(10 ** exponent);
  return exponent === 0
    ? "1"
    : `10${exponent < 0 ? "⁻" : ""}${[...String(Math.abs(exponent))].map((digit) => SUPERSCRIPTS[digit]).join("")}`;
}

function setUpDensities(saes) {
  const shown = saes.filter((sae) => sae.density?.counts?.length);
  const section = document.getElementById("densities");
  if (!shown.length) {
    section.hidden = true;
    return;
  }
  const filled = shown.flatMap(({ density }) =>
    density.counts.flatMap((count, i) => (count > 0 ? [density.edges[i], density.edges[i + 1]] : []))
  );
  const xEnds = filled.length ? [Math.floor(Math.min(...filled)), Math.ceil(Math.max(...filled))] : [-5, 0];
  const architectures = [...new Set(saes.map((sae) => sae.architecture))];
  for (const sae of shown) {
    const { edges, counts } = sae.density;
    const inside = counts.map((_, i) => i).filter((i) =>
      edges[i] >= xEnds[0] - 1e-9 && edges[i + 1] <= xEnds[1] + 1e-9
    );
    const view = {
      edges: [...inside.map((i) => edges[i]), edges[inside.at(-1) + 1]],
      counts: inside.map((i) => counts[i]),
    };
    const dead = isNumber(sae.dead_fraction) && isNumber(sae.d_sae) ? Math.round(sae.dead_fraction * sae.d_sae) : null;
    const chart = html("div", { class: "chart" });
    const caption = html(
      "figcaption",
      {},
      sae.name,
      html(
        "span",
        { class: "count" },
        dead === null ? "" : `${dead.toLocaleString("en")} of ${sae.d_sae.toLocaleString("en")} never fired`,
      ),
    );
    document.getElementById("density-charts").append(html("figure", { "data-sae": sae.name }, caption, chart));
    const label = `Histogram of the latent densities of ${sae.name}`;
    drawResponsive(chart, (width, height) =>
      drawHistogram(width, height, view, {
        label,
        xTitle: "Density",
        xEnds,
        colour: colourOf(architectures.indexOf(sae.architecture)),
        tick: powerOfTen,
      }));
  }
}
