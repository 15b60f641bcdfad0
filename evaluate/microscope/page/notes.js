// All notes, by list, with exports.
import { read } from "./parts/api.js";
import { choice, field, heading, latentCard, linkTo, note } from "./parts/controls.js";

export async function showNotes(place, parameters, known, current) {
  const { notes } = await read("/api/notes");
  if (!current()) return;
  const lists = [...new Set(notes.flatMap((one) => one.lists))].sort();
  const wanted = parameters.get("list") ?? "";
  const shown = notes.filter((one) => !wanted || (wanted === "★" ? one.starred : one.lists.includes(wanted)));
  const picker = choice([["", "all"], ["★", "starred"], ...lists.map((name) => [name, name])], wanted);
  picker.addEventListener("change", () => location.hash = linkTo({ page: "notes", list: picker.value }));
  place.append(
    heading("Notes"),
    note("They are kept beside the run; labels stand before the explanations when the report is written again."),
    html(
      "div",
      { class: "controls" },
      field("List", picker),
      html("a", { href: "/api/notes", download: "notes.json" }, "Export JSON"),
      html("a", { href: "/api/notes?format=parquet", download: "notes.parquet" }, "Export Parquet"),
    ),
  );
  if (!shown.length) {
    return void place.append(html("p", { class: "empty" }, "No notes yet. Label or star a latent on its page."));
  }
  place.append(
    html(
      "ol",
      { class: "cards" },
      ...shown.map((one) => {
        const card = latentCard(one, { right: one.updated.slice(0, 10) });
        const rest = [one.comment, one.lists.join(", "), one.fits ? "" : "made before the index was built anew"].filter(
          Boolean,
        ).join(" · ");
        if (rest) card.append(html("span", { class: "why", dir: "auto" }, rest));
        return html("li", {}, card);
      }),
    ),
  );
}
