// What the model reads: a text, or the turns of a chat if the model's tokenizer has a template for them.
import { modelChats } from "./api.js";
import { area, button, choice, field, note } from "./controls.js";

const ROLES = ["system", "user", "assistant"];
const NO_CHAT = "Plain text only: this model's tokenizer has no chat template.";
const TURNS_NOTE = "The model answers the last turn; if that is the assistant's own, it goes on from there.";

// Return a field for a prompt that the address holds under `name`. `value()` is a text or a list of messages, and
// `address()` what an address needs to hold it, under that or another name.
export function promptField(label, name, parameters, { id, rows = 4 } = {}) {
  const text = area(parameters.get(name) ?? "", { rows, id, maxlength: 20000 });
  const plain = field(label, text, true);
  const turns = html("ol", { class: "turns" });
  const chat = html(
    "div",
    { class: "chat", role: "group", "aria-label": "Turns" },
    turns,
    html("div", { class: "controls" }, button("Add a turn", () => addTurn().querySelector("textarea").focus())),
    note(TURNS_NOTE),
  );
  const kinds = [["text", "Text"], ["chat", "Chat"]].map(([kind, title]) =>
    button(title, () => show(kind === "chat"), { class: "pill", "aria-pressed": "false" })
  );
  const offer = html("div", { class: "kinds" });
  const element = html("div", { class: "prompt" }, offer, plain, chat);
  let chats = false;

  function addTurn(role = turns.children.length % 2 ? "assistant" : "user", content = "") {
    const number = turns.children.length + 1;
    const who = choice([...new Set([...ROLES, role])], role, { "aria-label": `Role of turn ${number}` });
    const said = area(content, { rows: 2, maxlength: 20000, "aria-label": `Turn ${number}` });
    const turn = html("li", { class: "turn" }, who, said);
    turn.append(button("Remove", () => removeTurn(turn), { "aria-label": "Remove this turn" }));
    turns.append(turn);
    return turn;
  }
  function removeTurn(turn) {
    turn.remove();
    if (!turns.children.length) addTurn();
    turns.querySelector("textarea").focus();
  }
  function show(asChat) {
    chats = asChat;
    plain.hidden = asChat;
    chat.hidden = !asChat;
    kinds.forEach((kind, i) => kind.setAttribute("aria-pressed", String(asChat === (i === 1))));
    if (asChat && !turns.children.length) addTurn("user", text.value);
  }

  const given = parameters.getAll(`${name}_turn`).map((turn) => turn.split(/:(.*)/s));
  for (const [role, content] of given) addTurn(role, content ?? "");
  show(given.length > 0);
  modelChats().then((can) => {
    if (can) offer.replaceChildren(...kinds);
    else if (can === false) {
      offer.replaceChildren(note(NO_CHAT));
      plain.after(offer);
    }
  }, () => {});

  const messages = () =>
    [...turns.children].map((turn) => ({
      role: turn.querySelector("select").value,
      content: turn.querySelector("textarea").value,
    }));
  return {
    element,
    value: () => chats ? messages() : text.value,
    isEmpty: () => chats ? messages().every(({ content }) => !content.trim()) : !text.value.trim(),
    address: (as = name) =>
      chats ? { [`${as}_turn`]: messages().map(({ role, content }) => `${role}:${content}`) } : { [as]: text.value },
  };
}

// A prompt as the body of a request that names a text and messages apart.
export const asBody = (prompt) => typeof prompt === "string" ? { text: prompt } : { messages: prompt };
