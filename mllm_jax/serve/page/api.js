// The server's answers: whole, or as server-sent events.

// What a person can be told; `status` is HTTP's, 0 where no answer came.
export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function request(path, key, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Problem("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    said = response.statusText;
  }
  const wait = response.headers.get("Retry-After");
  const before = {
    401: "The server wants an API key (see Settings)",
    413: "Too large",
    429: wait ? `The server is busy; try again in ${wait} s` : "The server is busy",
    503: "The server is shutting down",
  }[response.status];
  throw new Problem(before ? `${before}: ${said}` : said || `The server answered ${response.status}`, response.status);
}

const post = (path, body, key, signal) => request(path, key, { method: "POST", body: JSON.stringify(body), signal });

export async function models(key) {
  return (await (await request("/v1/models", key)).json()).data;
}

export async function attention(body, key) {
  return (await post("/v1/attention", body, key)).json();
}

// Yields {text} and at last {end}, why the answer ended.
export async function* answerStream(body, key, signal) {
  const response = await post("/v1/chat/completions", { ...body, stream: true }, key, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  let complete = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (left + value).split("\n\n");
      left = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const data = event.slice(6);
        if (data === "[DONE]") { complete = true; continue; }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Problem(chunk.error.message);
        const [choice] = chunk.choices;
        if (choice) yield { text: choice.delta.content ?? "", end: choice.finish_reason };
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof Problem) throw error;
    throw new Problem("The server went away in the middle of the answer.");
  }
  if (!complete) throw new Problem("The server went away in the middle of the answer.");
}
