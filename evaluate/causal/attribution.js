// Tokens coloured by the scores of their latents, and a table of the latents of all tokens or of one.
const found = JSON.parse(document.getElementById("data").textContent);
const SHOWN = 60;
const hooks = [...new Set(found.rows.map((row) => row.hook_point))];
const signed = (value) => (isNumber(value) ? `${value < 0 ? "−" : "+"}${formatNumber(Math.abs(value))}` : "–");
const tone = (value) => (value < 0 ? "against" : "for");
let chosen = null;

const sums = found.tokens.map((_, i) => found.rows.reduce((sum, row) => sum + (row.position === i ? row.score : 0), 0));
const largest = Math.max(...sums.map(Math.abs), 1e-12);
const largestRow = Math.max(...found.rows.map((row) => Math.abs(row.score)), 1e-12);
const shown = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥") || "∅";
const buttons = found.token_texts.map((text, i) => {
  const heat = (Math.abs(sums[i]) / largest).toFixed(3);
  const button = html(
    "button",
    { type: "button", class: tone(sums[i]), style: `--heat: ${heat}`, "aria-pressed": "false" },
    shown(text),
  );
  const errors = hooks.map((hook) => found.errors[hook]?.[i] ?? 0).reduce((a, b) => a + b, 0);
  describe(button, () => `token ${i}\nlatents ${signed(sums[i])}\nerror ${signed(errors)}`);
  button.addEventListener("click", () => {
    chosen = chosen === i ? null : i;
    draw();
  });
  return button;
});
document.getElementById("tokens").append(...buttons);

function draw() {
  buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(chosen === i)));
  const rows = found.rows.filter((row) => chosen === null || row.position === chosen);
  const some = rows.slice(0, SHOWN);
  const about = chosen === null ? "of all tokens" : `of token ${chosen}, ${shown(found.token_texts[chosen])}`;
  document.getElementById("latents-note").textContent = rows.length > some.length
    ? `The ${SHOWN} largest scores ${about}, of ${rows.length.toLocaleString("en")}.`
    : `${rows.length} scores ${about}.`;
  document.getElementById("latents").replaceChildren(
    ...some.map((row) =>
      html(
        "tr",
        {},
        html(
          "th",
          { scope: "row", class: "text" },
          hooks.length > 1 ? `${row.hook_point} ${row.latent}` : `${row.latent}`,
        ),
        html(
          "td",
          { class: "text" },
          html("code", { class: "token" }, shown(found.token_texts[row.position])),
          ` ${row.position}`,
        ),
        html("td", {}, formatNumber(row.activation)),
        html("td", {}, signed(row.score)),
        html("td", {}, signed(row.ablation)),
        html(
          "td",
          { class: `share ${tone(row.score)}` },
          html("div", { style: `--share: ${((100 * Math.abs(row.score)) / largestRow).toFixed(1)}%` }),
        ),
      )
    ),
  );
}
draw();
