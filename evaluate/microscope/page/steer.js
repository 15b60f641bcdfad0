// Steer: edits of latents, continuations with and without them side by side, and the curve of strength.
import { stream } from "./parts/api.js";
import { button, editText, field, heading, linkTo, note, number, readEdit, runner } from "./parts/controls.js";
import { asRequest, editRow } from "./parts/edit_row.js";
import { promptField } from "./parts/prompt.js";
import { drawStrengths } from "./parts/strengths.js";

export function showSteer(place, parameters, known, current) {
  const usable = known.list.filter((sae) => sae.has_weights).map((sae) => sae.name);
  const prompt = promptField("Prompt", "prompt", parameters, { rows: 3, id: "prompt" });
  const rows = html("div", { class: "edits-list" });
  const settings = {
    max_new_tokens: number(parameters.get("max_new_tokens") ?? 30, {
      min: 1,
      max: known.limits.max_new_tokens,
      step: 1,
    }),
    temperature: number(parameters.get("temperature") ?? 0.7, { min: 0, max: 10, step: 0.1 }),
    n: number(parameters.get("n") ?? 1, { min: 1, max: known.limits.max_samples, step: 1 }),
    seed: number(parameters.get("seed") ?? 0, { min: 0, step: 1 }),
  };
  const titles = { max_new_tokens: "Tokens", temperature: "Temperature", n: "Samples", seed: "Seed" };
  const [go, stop, curve] = [
    button("Steer", null, { id: "go" }),
    button("Cancel"),
    button("Curve of strength", null, { id: "curve" }),
  ];
  const share = button("Copy link", () => {
    history.replaceState(null, "", address());
    navigator.clipboard?.writeText(location.href);
    share.textContent = "Copied";
  });
  const [status, result] = [note("", { role: "status" }), html("div", { class: "result", id: "steered" })];
  place.append(
    heading("Steer"),
    note("The model continues the prompt with its latents as they are, and once more with these edits."),
    prompt.element,
    html("h2", {}, "Edits"),
    rows,
    html(
      "div",
      { class: "controls" },
      button("Add a latent", () => rows.append(editRow(readEdit(editText({ sae: usable[0], latent: 0 })), usable))),
    ),
    html(
      "div",
      { class: "controls settings" },
      ...Object.entries(settings).map(([key, input]) => field(titles[key], input)),
    ),
    html("div", { class: "controls" }, go, stop, curve, share),
    status,
    result,
  );

  const given = parameters.getAll("edit").map(readEdit);
  rows.append(...given.map((edit) => editRow(edit, usable)));
  const edits = () => [...rows.children].map((row) => row.read());
  const requested = () => edits().map(asRequest);
  const sampling = () => Object.fromEntries(Object.entries(settings).map(([key, input]) => [key, Number(input.value)]));
  const address = () =>
    linkTo({
      page: "steer",
      ...prompt.address(),
      edit: edits().map(editText),
      ...sampling(),
    });

  const start = runner(go, stop, result);
  const begin = (work) => {
    start(async (signal) => {
      status.textContent = "Waiting for the model…";
      try {
        await Promise.all([...rows.children].map((row) => row.suggested()));
        history.replaceState(null, "", address());
        await work(signal);
        status.textContent = "Done.";
      } catch (error) {
        status.textContent = error.name === "AbortError" ? "Cancelled." : "";
        throw error;
      }
    });
  };
  const onQueue = (content) =>
    status.textContent = content.state === "loading" ? "The model loads…" : `${content.ahead} before this one…`;
  go.addEventListener("click", () =>
    begin(async (signal) => {
      const views = new Views(result, sampling().n);
      const body = { prompt: prompt.value(), edits: requested(), sampling: sampling() };
      await stream("/api/steer", body, (event, content) => {
        if (event === "queued") onQueue(content);
        else views.take(event, content, status);
      }, signal);
    }));
  curve.addEventListener("click", () =>
    begin(async (signal) => {
      const [edit] = requested();
      if (!edit) throw new Error("Add a latent first.");
      const strengths = [0, 0.5, 1, 2, 3, 4].map((factor) => factor * (edit.strength || 1));
      const points = [];
      await stream("/api/steer/curve", {
        prompt: prompt.value(),
        edit,
        strengths,
        sampling: { ...sampling(), max_new_tokens: Math.min(20, sampling().max_new_tokens) },
      }, (event, content) => {
        if (event === "queued") onQueue(content);
        if (event !== "points") return;
        points.push(...content.points);
        status.textContent = `${new Set(points.map((point) => point.strength)).size} of ${strengths.length} strengths`;
        drawStrengths(result, points);
      }, signal);
    }));
  if (!prompt.isEmpty() && given.length && parameters.get("go") === "true" && current()) go.click();
}

// What a steering request streams: the next token's probabilities, and continuations that grow.
class Views {
  constructor(place, n) {
    this.texts = { clean: [], steered: [] };
    const columns = Object.keys(this.texts).map((kind) => {
      const list = html("ol", { class: "contexts card", "aria-live": "off" });
      for (let i = 0; i < n; i++) {
        const text = html("p", { class: "context-text", dir: "auto" });
        this.texts[kind].push(text);
        list.append(html("li", { class: "context" }, text));
      }
      return html(
        "section",
        { class: "half", "data-kind": kind },
        html("h2", {}, kind === "clean" ? "As it is" : "Steered"),
        list,
      );
    });
    this.next = html("section", {});
    place.replaceChildren(html("div", { class: "halves" }, ...columns), this.next);
  }

  take(event, content, status) {
    if (event === "start") this.prompt = content.tokens.slice(1).join("");
    if (event === "next") this.drawNext(content);
    if (event === "token") {
      status.textContent = content.kind === "clean" ? "Continuing as it is…" : "Continuing with the edits…";
      const place = this.texts[content.kind][content.sample];
      if (!place.childNodes.length) place.append(html("span", { class: "quiet-text" }, this.prompt));
      place.append(content.text);
    }
    if (event === "done") {
      for (const [kind, places] of Object.entries(this.texts)) {
        places.forEach((place, i) =>
          place.replaceChildren(html("span", { class: "quiet-text" }, this.prompt), content[kind][i] || " (nothing)")
        );
      }
    }
  }

  drawNext({ tokens, kl }) {
    const largest = Math.max(...tokens.flatMap((row) => [row.clean, row.steered]));
    const bar = (value, kind) =>
      html(
        "td",
        { class: "probability" },
        html("span", { class: kind, style: `--share: ${(100 * value) / largest}%` }),
        `${(100 * value).toFixed(1)}%`,
      );
    const rows = tokens.slice(0, 14).map((row) =>
      html(
        "tr",
        {},
        html("th", { scope: "row", class: "text" }, html("code", { class: "token" }, compact(row.text))),
        bar(row.clean, "before"),
        bar(row.steered, "after"),
      )
    );
    const head = html(
      "tr",
      {},
      ...["Next token", "As it is", "Steered"].map((title, i) =>
        html("th", { scope: "col", class: i ? "plain" : "text plain" }, title)
      ),
    );
    this.next.replaceChildren(
      html("h2", {}, "The next token"),
      note(`The edits move the distribution by ${formatNumber(kl)} nats (KL divergence).`),
      html(
        "div",
        { class: "scroll" },
        html("table", { class: "next" }, html("thead", {}, head), html("tbody", {}, ...rows)),
      ),
    );
  }
}
