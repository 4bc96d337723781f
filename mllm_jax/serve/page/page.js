// The conversation: what is asked, whom, and what comes back. Text of people and models only ever becomes textContent.
import { answerStream, models, Problem } from "./api.js";
import { look } from "./look.js";
import { element } from "./element.js";

const $ = (id) => document.getElementById(id);
const main = $("conversation");

let known = [];   // the server's models
let turns = [];   // {content, answers: Map(model -> text)}
let files = [];   // of the next question: {kind, name, url, data}
let running = []; // AbortControllers of answers that are being made

const key = () => $("key").value.trim();
const chosen = () => [...new Set([$("first").value, $("second").value])].filter(Boolean);
const named = ({ id, connector }) => (id === connector ? id : `${id} (${connector})`);
const say = (text) => { $("status").textContent = text; };

function settings() {
  const number = (id) => ($(id).value === "" || !$(id).validity.valid ? undefined : Number($(id).value));
  return Object.fromEntries(
    ["temperature", "top_p", "seed", "max_tokens"].map((id) => [id, number(id)]).filter(([, value]) => value !== undefined),
  );
}

// The messages that a model is sent: the questions to which it has an answer, and the last one.
function messagesFor(model, last) {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, turns.indexOf(last))) {
    if (!turn.answers.get(model)) continue;
    messages.push({ role: "user", content: turn.content }, { role: "assistant", content: turn.answers.get(model) });
  }
  return [...messages, { role: "user", content: last.content }];
}

async function loadModels() {
  try {
    known = await models(key());
  } catch (problem) {
    $("welcome").append(element("p", { className: "wrong", role: "alert" }, problem.message));
    if (problem.status === 401) askForKey();
    return;
  }
  document.querySelectorAll("#welcome .wrong").forEach((each) => each.remove());
  const options = () => known.map((model) => element("option", { value: model.id }, named(model)));
  $("first").replaceChildren(...options());
  $("second").replaceChildren(element("option", { value: "" }, "none"), ...options());
  $("comparing").hidden = $("two").hidden = known.length < 2;
  $("second").value = known.length > 1 ? known[1].id : "";
}

function askForKey() {
  $("settings").open = true;
  $("key").focus();
}

// ------------------------------------------------------------------------------------------------ images and videos

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function addFiles(given) {
  for (const file of given) {
    const kind = file.type.split("/")[0];
    if (kind !== "image" && kind !== "video") {
      say(`${file.name} is neither an image nor a video`);
      continue;
    }
    try {
      files.push({ kind, name: file.name || kind, url: URL.createObjectURL(file), data: await readFile(file) });
    } catch {
      say(`${file.name} cannot be read`);
    }
  }
  showFiles();
  $("question").focus();
}

const preview = ({ kind, url, name }, controls) =>
  kind === "image"
    ? element("img", { src: url, alt: name })
    : element("video", { src: url, muted: true, controls, preload: "metadata", ariaLabel: `video ${name}` });

function showFiles() {
  $("files").replaceChildren(
    ...files.map((file, index) => {
      const remove = element("button", { type: "button", ariaLabel: `remove ${file.name}` }, "×");
      remove.onclick = () => { files.splice(index, 1); showFiles(); $("question").focus(); };
      return element("li", {}, preview(file, false), remove);
    }),
  );
}

// ---------------------------------------------------------------------------------------------------------- answers

// Whoever has scrolled up to read is left there.
function following(change) {
  const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
  change();
  if (atEnd) main.scrollTop = main.scrollHeight;
}

async function answer(turn, model, box) {
  const connector = known.find((each) => each.id === model)?.connector ?? "";
  const text = element("p", { className: "text" });
  const under = element("div", { className: "under" });
  box.replaceChildren(element("h2", {}, `${model} `, element("small", {}, connector === model ? "" : connector)), text, under);
  box.className = "answer busy";
  box.setAttribute("aria-busy", "true");
  const stopper = new AbortController();
  running.push(stopper);
  showRunning();
  turn.answers.delete(model);
  const messages = messagesFor(model, turn);
  const started = performance.now();
  let pieces = 0;
  let end = "";
  let failed = false;
  try {
    const body = { model, messages, ...settings() };
    for await (const piece of answerStream(body, key(), stopper.signal)) {
      if (piece.end) end = piece.end;
      if (!piece.text) continue;
      pieces += 1;
      following(() => text.append(piece.text));
    }
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    under.append(element("span", {}, end === "length" ? `${seconds} s, cut at the most tokens` : `${seconds} s`));
    if (!pieces) text.append(element("i", {}, "(an empty answer)"));
  } catch (problem) {
    if (stopper.signal.aborted) {
      under.append(element("span", {}, "stopped"));
    } else {
      failed = true;
      const again = element("button", { type: "button" }, "Try again");
      again.onclick = () => answer(turn, model, box);
      under.append(again);
      const message = problem instanceof Problem ? problem.message : "The page failed: " + problem.message;
      following(() => text.after(element("p", { className: "wrong", role: "alert" }, message)));
      if (problem.status === 401) askForKey();
    }
  } finally {
    running = running.filter((each) => each !== stopper);
    showRunning();
    box.className = "answer";
    box.removeAttribute("aria-busy");
  }
  const said = pieces && !failed ? text.textContent : ""; // half an answer is shown, but the model is not told that it said it
  if (!said) return;
  turn.answers.set(model, said);
  say(`${model}: ${said.slice(0, 300)}`);
  const shows = messages.some((message) => Array.isArray(message.content) && message.content.some((part) => part.type !== "text"));
  if (!shows) return;
  const button = element("button", { type: "button", ariaExpanded: "false" }, "Where it looked");
  under.append(button);
  let panel = null;
  button.onclick = () => {
    const opens = !panel;
    button.ariaExpanded = String(opens);
    panel?.remove();
    panel = opens ? look({ model, messages: [...messages, { role: "assistant", content: said }] }, key) : null;
    if (panel) box.append(panel);
  };
}

function showRunning() {
  $("send").hidden = running.length > 0;
  $("stop").hidden = running.length === 0;
}

function ask() {
  const words = $("question").value.trim();
  if (running.length || (!words && !files.length)) return;
  if (!known.length) {
    loadModels();
    return;
  }
  const media = files.map((file) => ({ type: `${file.kind}_url`, [`${file.kind}_url`]: { url: file.data } }));
  const content = media.length ? [...media, ...(words ? [{ type: "text", text: words }] : [])] : words;
  const turn = { content, answers: new Map() };
  turns.push(turn);
  $("welcome")?.remove();
  const asked = element("div", { className: "asked" });
  if (files.length) asked.append(element("div", { className: "media" }, ...files.map((file) => preview(file, true))));
  if (words) asked.append(element("p", {}, words));
  const boxes = chosen().map((model) => [model, element("section", { ariaLabel: `answer of ${model}` })]);
  const answers = element("div", { className: "answers" }, ...boxes.map(([, box]) => box));
  main.append(element("article", {}, asked, answers));
  main.scrollTop = main.scrollHeight;
  files = [];
  showFiles();
  $("question").value = "";
  $("question").focus();
  for (const [model, box] of boxes) answer(turn, model, box);
}

const stop = () => running.forEach((each) => each.abort());

function startAgain() {
  stop();
  turns = [];
  main.replaceChildren();
  say("New conversation");
  $("question").focus();
}

// ----------------------------------------------------------------------------------------------------------- events

$("composer").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if ($("settings").open) { $("settings").open = false; $("settings").querySelector("summary").focus(); } else stop();
});
$("settings").querySelector("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("click", (event) => { if (!$("settings").contains(event.target)) $("settings").open = false; });
$("stop").addEventListener("click", () => { stop(); $("question").focus(); });
$("new").addEventListener("click", startAgain);
$("key").addEventListener("change", () => { if (!known.length) loadModels(); });
$("choose").addEventListener("change", () => { addFiles([...$("choose").files]); $("choose").value = ""; });
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) { event.preventDefault(); addFiles([...event.clipboardData.files]); }
});
let over = 0;
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => { if (carriesFiles(event)) { over += 1; $("drop").hidden = false; } });
document.addEventListener("dragleave", (event) => { if (carriesFiles(event)) { over -= 1; $("drop").hidden = over > 0 ? false : true; } });
document.addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  over = 0;
  $("drop").hidden = true;
  addFiles([...event.dataTransfer.files]);
});

loadModels();
$("question").focus();
