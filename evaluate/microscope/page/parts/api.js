// Requests to the server: JSON, and server-sent events of long work.
async function failure(response) {
  try {
    return new Error((await response.json()).error);
  } catch {
    return new Error(`the server answered ${response.status}`);
  }
}

async function sent(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The microscope does not answer; is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

const withBody = (method, body, signal) => ({
  method,
  signal,
  headers: { "content-type": "application/json" },
  body: JSON.stringify(body),
});

export const read = async (path, signal) => (await sent(path, { signal })).json();
export const post = async (path, body, signal) => (await sent(path, withBody("POST", body, signal))).json();
export const put = async (path, body) => (await sent(path, withBody("PUT", body))).json();

// Call `on(event, content)` for each event that the answer to a request streams.
export async function stream(path, body, on, signal) {
  const response = await sent(path, withBody("POST", body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (kept + value).split("\n\n");
    kept = blocks.pop();
    for (const block of blocks) {
      const [event, data] = block.split("\n").map((line) => line.slice(line.indexOf(": ") + 2));
      const content = JSON.parse(data);
      if (event === "error") throw new Error(content.error);
      on(event, content);
    }
  }
}

const inPath = (name) => name.split("/").map(encodeURIComponent).join("/");
export const saePath = (name) => `/api/saes/${inPath(name)}`;
export const latentPath = (name, latent) => `${saePath(name)}/latents/${latent}`;

let known = null;
// The run and its SAEs, which do not change while the server runs.
export function run() {
  known ??= Promise.all([read("/api/run"), read("/api/saes")]).then(([about, { saes }]) => ({ ...about, list: saes }));
  known.catch(() => known = null);
  return known;
}

let chats = null;
// Whether the model takes a chat, once it is loaded; null if there is no model.
export function modelChats() {
  chats ??= (async () => {
    for (;;) {
      const { model } = await read("/api/status");
      if (model.state !== "loading") return model.chats;
      await new Promise((done) => setTimeout(done, 1000));
    }
  })();
  chats.catch(() => chats = null);
  return chats;
}
