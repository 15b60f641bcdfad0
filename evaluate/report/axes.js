// Linear and logarithmic scales with round ticks, and the axes drawn from them.
function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  const factors = decades * 3 <= count + 1 ? [1, 2, 5] : [1];
  const stride = Math.max(1, Math.ceil(decades / Math.max(2, count)));
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    if (factors.length === 1 && power % stride) continue;
    for (const factor of factors) {
      const tick = Number(`${factor}e${power}`);
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks.length >= 2 ? ticks : linearTicks(low, high, count);
}

// Return a scale from data to pixels that covers the values' range, with a margin at both ends.
function makeScale(values, from, to, { log = false, room = 0.06, count = 5, ends = null } = {}) {
  const finite = values.filter((value) => isNumber(value) && (!log || value > 0));
  let [low, high] = ends ?? [Math.min(...finite), Math.max(...finite)];
  if (!finite.length && !ends) [low, high] = log ? [1, 10] : [0, 1];
  if (low === high) {
    [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) * 0.05, high + (Math.abs(high) || 1) * 0.05];
  }
  const inner = log ? Math.log10 : (value) => value;
  const margin = (inner(high) - inner(low)) * room;
  const [start, end] = [inner(low) - margin, inner(high) + margin];
  const scale = (value) => from + ((inner(value) - start) / (end - start)) * (to - from);
  const outer = log ? (value) => 10 ** value : (value) => value;
  scale.invert = (pixel) => outer(start + ((pixel - from) / (to - from)) * (end - start));
  scale.ticks = log ? logTicks(outer(start), outer(end), count) : linearTicks(start, end, count);
  scale.log = log;
  return scale;
}

function formatTick(value, log) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${Number((value / 1e9).toPrecision(3))}B`;
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (log && size < 1e-3 && size > 0) return value.toExponential(0).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

// Draw grid lines, ticks and titles around `frame` = {left, right, top, bottom}, in pixels.
function drawAxes(frame, x, y, xTitle, yTitle) {
  const group = svg("g", { "aria-hidden": "true" });
  for (const tick of y.ticks) {
    const at = y(tick);
    group.append(svg("line", { class: "grid", x1: frame.left, x2: frame.right, y1: at, y2: at }));
    group.append(svg("text", { x: frame.left - 8, y: at + 4, "text-anchor": "end" }, formatTick(tick, y.log)));
  }
  for (const tick of x.ticks) {
    const at = x(tick);
    group.append(svg("line", { class: "grid", x1: at, x2: at, y1: frame.top, y2: frame.bottom }));
    group.append(svg("text", { x: at, y: frame.bottom + 18, "text-anchor": "middle" }, formatTick(tick, x.log)));
  }
  group.append(svg("line", { class: "base", x1: frame.left, x2: frame.right, y1: frame.bottom, y2: frame.bottom }));
  group.append(
    svg("text", { class: "axis-title", x: frame.right, y: frame.bottom + 38, "text-anchor": "end" }, xTitle),
  );
  group.append(svg("text", { class: "axis-title", x: 0, y: frame.top - 12 }, yTitle));
  return group;
}

const leftMargin = (y) => 16 + 7 * Math.max(...y.ticks.map((tick) => formatTick(tick, y.log).length), 2);
