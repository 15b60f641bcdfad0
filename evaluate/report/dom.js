// Helpers that build SVG and HTML elements, the tooltip, and the highlighting of one SAE in all charts.
const NS = "http://www.w3.org/2000/svg";

// A style is set as a property, because a strict content security policy forbids the attribute.
function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") node.style.cssText = value;
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(NS, tag);
  return filled(node, attributes, children);
}

function html(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  return filled(node, attributes, children);
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function formatNumber(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

const tooltip = document.getElementById("tooltip");

function showTooltip(text, x, y) {
  tooltip.textContent = text;
  tooltip.hidden = false;
  const box = tooltip.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth ? x - box.width - 14 : x + 14;
  const top = y + 16 + box.height > innerHeight ? y - box.height - 12 : y + 16;
  tooltip.style.left = `${Math.max(8, Math.min(left, innerWidth - box.width - 8))}px`;
  tooltip.style.top = `${Math.max(8, top)}px`;
}

function hideTooltip() {
  tooltip.hidden = true;
}

addEventListener("keydown", (event) => event.key === "Escape" && hideTooltip());
addEventListener("scroll", hideTooltip, { passive: true, capture: true });

// Show `text()` as a tooltip while the pointer is over the element or it has keyboard focus.
function describe(element, text) {
  element.addEventListener("pointermove", (event) => showTooltip(text(), event.clientX, event.clientY));
  element.addEventListener("pointerleave", hideTooltip);
  element.addEventListener("focus", () => {
    if (!element.matches(":focus-visible")) return;
    const box = element.getBoundingClientRect();
    showTooltip(text(), box.left + Math.min(box.width / 2, 60), box.bottom - 8);
  });
  element.addEventListener("blur", hideTooltip);
}

function light(name) {
  document.body.classList.toggle("lighting", name !== null);
  for (const node of document.querySelectorAll("[data-sae]")) node.classList.toggle("lit", node.dataset.sae === name);
}

function lightOnHover(element, name) {
  element.addEventListener("pointerenter", () => light(name));
  element.addEventListener("pointerleave", () => light(null));
  element.addEventListener("focus", () => element.matches(":focus-visible") && light(name));
  element.addEventListener("blur", () => light(null));
}

// Let the arrow keys move the focus from line to line of a list of links.
function moveByArrows(list) {
  list.addEventListener("keydown", (event) => {
    const line = document.activeElement.closest("li");
    const next = { ArrowDown: line?.nextElementSibling, ArrowUp: line?.previousElementSibling }[event.key];
    if (!next) return;
    event.preventDefault();
    next.firstElementChild.focus();
  });
}

// Draw whenever the container's width changes; return a function that redraws.
function drawResponsive(container, draw) {
  let width = 0;
  const redraw = () => {
    if (container.clientWidth > 0) container.replaceChildren(draw(container.clientWidth, container.clientHeight));
  };
  new ResizeObserver(() => {
    if (container.clientWidth === width) return;
    width = container.clientWidth;
    redraw();
  }).observe(container);
  return redraw;
}
