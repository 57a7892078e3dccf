/** Requests to this server: JSON, and streams of server-sent events. */

const KEY = "api-key";
let tellKeyWanted = () => {};

/** What to do when the server wants a key. */
export function onKeyWanted(action) {
  tellKeyWanted = action;
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function check(response) {
  if (response.ok) return response;
  if (response.status === 401) tellKeyWanted();
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not in the shape of an error of ours: the status says enough
  }
  throw new Error(message);
}

export async function getJson(path) {
  const response = await check(await fetch(path, { headers: headers() }));
  return response.json();
}

/** Post a request, and yield its events as they come. Throws what the server says went wrong. */
export async function* postForEvents(path, body, signal) {
  const response = await check(await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (!data) continue;
      if (data === "[DONE]") return;
      const read = JSON.parse(data);
      if (read.error) throw new Error(read.error.message);
      yield read;
    }
  }
}
