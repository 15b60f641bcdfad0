// The table of metrics: sort by any column, filter rows, and show each column's definition.
function compareCells(a, b, numeric, direction) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return direction * (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
}

function setUpTable() {
  const table = document.getElementById("metrics");
  const body = table.tBodies[0];
  const status = document.getElementById("table-status");
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    const better = button.dataset.better ? `\n${button.dataset.better} is better` : "";
    button.setAttribute("aria-description", button.dataset.definition);
    describe(button, () => button.dataset.definition + better);
    button.addEventListener("click", () => {
      const numeric = !head.classList.contains("text");
      const first = numeric && button.dataset.better !== "lower" ? "descending" : "ascending";
      const sort = head.ariaSort === "none" ? first : head.ariaSort === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.ariaSort = "none";
      head.ariaSort = sort;
      const value = (row) => row.cells[column].dataset.value;
      body.append(
        ...[...body.rows].sort((a, b) => compareCells(value(a), value(b), numeric, sort === "ascending" ? 1 : -1)),
      );
      status.textContent = `Sorted by ${button.textContent}, ${sort}.`;
    });
  });
  for (const row of body.rows) lightOnHover(row, row.dataset.sae);
  for (const cell of table.querySelectorAll("[data-interval]")) {
    describe(cell, () => cell.dataset.interval);
    cell.append(
      Object.assign(document.createElement("span"), { className: "hidden", textContent: `, ${cell.dataset.interval}` }),
    );
  }
  document.getElementById("table-filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      shown += !row.hidden;
    }
    status.textContent = `${shown} of ${body.rows.length} SAEs shown.`;
  });
}
