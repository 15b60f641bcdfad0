// One edit of a latent as a row of form fields, with the strength that the server suggests until the user gives one.
import { latentPath, read } from "./api.js";
import { button, choice, field, latentLink, note, number } from "./controls.js";

const ACTIONS = ["add", "clamp", "scale", "ablate"];
const PLACES = [["all", "all tokens"], ["prompt", "the prompt"], ["generated", "what is generated"], [
  "active",
  "where it fires",
]];
const WHOLE = new Set(["all", "prompt", "generated", "active"]);
const FACTOR = 2;

// An edit as the server reads it: positions are a list of numbers, and an ablation has a strength that says nothing.
export const asRequest = ({ where, strength, ...rest }) => ({
  ...rest,
  strength: Number(strength),
  where: WHOLE.has(where) ? where : where.split(" ").filter(Boolean).map(Number),
});

// Return the row. Its `read()` is the edit, and `suggested()` waits for a strength that has been asked for.
export function editRow(edit, usable) {
  const sae = choice(usable, usable.includes(edit.sae) ? edit.sae : usable[0]);
  const latent = number(edit.latent, { min: 0, step: 1, class: "latent-number" });
  const action = choice(ACTIONS, edit.action);
  const strength = number(edit.strength);
  const unit = choice([["max", "× maximum"], ["activation", "activation"]], edit.unit);
  const positions = !WHOLE.has(edit.where);
  const where = choice([...PLACES, ["positions", "these tokens:"]], positions ? "positions" : edit.where);
  const list = html("input", { type: "text", size: 8, placeholder: "3 4 5", "aria-label": "Positions of tokens" });
  list.value = positions ? edit.where : "";
  const look = html("a", { class: "look" }, "look");
  const why = note("", { class: "note why", "aria-live": "polite" });
  const row = html(
    "div",
    { class: "controls edit" },
    field("SAE", sae),
    field("Latent", latent),
    look,
    field("Action", action),
    field("Strength", strength),
    unit,
    field("At", where),
    list,
  );
  row.append(button("Remove", () => row.remove(), { "aria-label": "Remove this edit" }), why);
  unit.setAttribute("aria-label", "Unit of the strength");

  let own = edit.strength !== "";
  let asked = Promise.resolve();
  const suggest = () => {
    if (own || action.value === "ablate") return;
    if (action.value === "scale") {
      strength.value = FACTOR;
      why.textContent = "";
      return;
    }
    const path = latentPath(sae.value, latent.value);
    asked = read(`${path}/strength`).then((found) => {
      if (own || latentPath(sae.value, latent.value) !== path) return;
      strength.value = found.strength;
      unit.value = found.unit;
      why.textContent = reason(found);
    }, (error) => why.textContent = error.message);
  };
  const update = () => {
    look.href = latentLink(sae.value, latent.value);
    strength.parentElement.hidden = action.value === "ablate";
    unit.hidden = action.value === "scale" || action.value === "ablate";
    list.hidden = where.value !== "positions";
  };
  row.addEventListener("input", (event) => {
    update();
    if (event.target === strength || event.target === unit) {
      own = strength.value !== "";
      why.textContent = "";
    }
    if ([sae, latent, action, strength].includes(event.target)) suggest();
  });
  update();
  suggest();
  row.read = () => ({
    sae: sae.value,
    latent: Number(latent.value),
    action: action.value,
    strength: strength.value === "" ? "" : Number(strength.value),
    unit: unit.value,
    where: where.value === "positions" ? list.value.trim().split(/[\s,;]+/).join(" ") : where.value,
  });
  row.suggested = () => asked;
  return row;
}

function reason({ unit, max_activation, length }) {
  const vector = length === null
    ? ""
    : `; the added vector is ${length.toFixed(2)} times as long as a typical activation`;
  if (unit === "max") return `Suggested: twice the largest activation, ${formatNumber(max_activation)}${vector}.`;
  return `Suggested: a vector as long as a typical activation. The largest activation, ${
    formatNumber(max_activation)
  }, would be too much.`;
}
