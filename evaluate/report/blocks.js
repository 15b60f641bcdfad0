// Blocks of feature data, stored in the page or in script files beside it and unpacked on first use.
const summaries = new Map();
const details = new Map();
const waiting = new Map();
const KEPT_DETAILS = 32;

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// Called by the script files beside the page. On file: URLs `fetch` is not allowed, but script elements are.
globalThis.thresherBlock = (id, text) => {
  waiting.get(id)?.(text);
  waiting.delete(id);
};

function readBeside(folder, id) {
  return new Promise((resolve, reject) => {
    waiting.set(id, resolve);
    const script = html("script", { src: `${encodeURIComponent(folder)}/${id}.js` });
    script.onload = () => script.remove();
    script.onerror = () =>
      reject(new Error(`The file ${folder}/${id}.js is missing; keep that folder beside the report.`));
    document.head.append(script);
  });
}

// Return a block's content. Only the most recently used blocks of latents stay in memory.
function loadBlock(id, folder) {
  const kept = /-\d+$/.test(id) ? details : summaries;
  const found = kept.get(id) ??
    Promise.resolve(document.getElementById(`block-${id}`)?.textContent ?? readBeside(folder, id)).then(unpack);
  kept.delete(id);
  kept.set(id, found);
  found.catch(() => kept.delete(id));
  if (details.size > KEPT_DETAILS) details.delete(details.keys().next().value);
  return found;
}
