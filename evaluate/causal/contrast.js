// The table of latents that tell two sets of texts apart, and what their ablation does to each set.
const found = JSON.parse(document.getElementById("data").textContent);
const hooks = [...new Set(found.rows.map((row) => row.hook_point))];
const name = (row) => (hooks.length > 1 ? `${row.hook_point} ${row.latent}` : `${row.latent}`);
const within = (row, side) =>
  isNumber(row[`effect_${side}_low`])
    ? `95% interval ${formatNumber(row[`effect_${side}_low`])} to ${formatNumber(row[`effect_${side}_high`])}`
    : "no interval";

document.getElementById("contrast").append(
  ...found.rows.map((row) => {
    const effects = ["a", "b"].map((side) => {
      const cell = html("td", { tabindex: 0 }, formatNumber(row[`effect_${side}`]));
      describe(cell, () => within(row, side));
      return cell;
    });
    return html(
      "tr",
      {},
      html("th", { scope: "row", class: "text" }, name(row)),
      html("td", {}, formatNumber(row.mean_a)),
      html("td", {}, formatNumber(row.mean_b)),
      html("td", {}, row.auc.toFixed(3)),
      html("td", {}, `${row.auc_low.toFixed(2)} to ${row.auc_high.toFixed(2)}`),
      html("td", {}, formatNumber(row.q)),
      ...effects,
    );
  }),
);

const chart = document.getElementById("effects");
drawResponsive(chart, (width, height) => {
  const root = svg("svg", {
    width,
    height,
    role: "img",
    "aria-label": "Effect of ablation, one pair of dots for each latent",
  });
  const frame = { left: 0, right: width - 12, top: 12, bottom: height - 62 };
  const values = found.rows.flatMap((row) =>
    ["a", "b"].flatMap((side) => [row[`effect_${side}`], row[`effect_${side}_low`], row[`effect_${side}_high`]])
  );
  const y = makeScale([...values, 0], frame.bottom, frame.top);
  frame.left = leftMargin(y);
  const step = (frame.right - frame.left) / found.rows.length;
  const x = makeScale([0, found.rows.length], frame.left, frame.right, { room: 0 });
  x.ticks = [];
  root.append(drawAxes(frame, x, y, "Latent, in the order of the table", ""));
  root.append(svg("line", { class: "base", x1: frame.left, x2: frame.right, y1: y(0), y2: y(0) }));
  const every = Math.ceil(44 / step);
  found.rows.forEach((row, i) => {
    if (i % every === 0) {
      root.append(svg("text", { "text-anchor": "middle", x: x(i + 0.5), y: frame.bottom + 20 }, `${row.latent}`));
    }
    ["a", "b"].forEach((side, which) => {
      const at = x(i + 0.5) + (which ? 1 : -1) * Math.min(5, step / 5);
      const colour = `var(--a${which})`;
      if (isNumber(row[`effect_${side}_low`])) {
        root.append(
          svg("line", {
            class: "bar-of-a",
            x1: at,
            x2: at,
            y1: y(row[`effect_${side}_low`]),
            y2: y(row[`effect_${side}_high`]),
            stroke: colour,
          }),
        );
      }
      const dot = svg("circle", {
        cx: at,
        cy: y(row[`effect_${side}`]),
        r: Math.min(4.5, step / 4),
        stroke: colour,
        "stroke-width": 1.75,
        fill: which ? "var(--card)" : colour,
        tabindex: 0,
      });
      describe(
        dot,
        () =>
          `latent ${name(row)}\nAUC ${row.auc.toFixed(3)}\neffect in ${side} ${formatNumber(row[`effect_${side}`])}\n${
            within(row, side)
          }`,
      );
      root.append(dot);
    });
  });
  return root;
})();
