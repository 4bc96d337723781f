// Where an answer looked: the attention of its tokens, over the image as the model sees it.
import { attention } from "./api.js";
import { element } from "./element.js";

const NAMES = { image: "image", tiles: "tiles", frame: "frame" };

function add(rows) {
  return rows[0].map((_, index) => rows.reduce((sum, row) => sum + row[index], 0) / rows.length);
}

function heatColour() {
  const probe = element("i");
  document.body.append(probe);
  probe.style.color = "var(--heat)";
  const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return found;
}

// The least weight is clear, the most is full colour.
function paint(canvas, values, columns, least, most) {
  const rows = values.length / columns;
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  const [red, green, blue] = heatColour();
  values.forEach((value, index) => pixels.data.set([red, green, blue, Math.round((230 * (value - least)) / Math.max(most - least, 1e-9))], 4 * index));
  context.putImageData(pixels, 0, 0);
}

function paintBars(canvas, values) {
  const most = values.reduce((a, b) => Math.max(a, b), 1e-9);
  canvas.width = Math.max(values.length * 6, 60);
  canvas.height = 96;
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--heat");
  values.forEach((value, index) => context.fillRect(6 * index + 1, 96 * (1 - value / most), 4, (96 * value) / most));
}

const percent = (share) => `${(100 * share).toFixed(share < 0.001 ? 3 : share < 0.1 ? 1 : 0)} %`;
const shown = (piece) => piece.replaceAll("\n", "↵").trim() || "·";

function caption(view, several) {
  const where = several ? ` of ${view.kind === "frame" ? "video" : "image"} ${view.image + 1}` : "";
  return view.kind === "frame" ? `frame ${view.number + 1}${where}` : `${NAMES[view.kind]}${where}`;
}

// A panel that asks the server for the attention of the last message in `body`.
export function look(body, key) {
  const panel = element("div", { className: "look", ariaLabel: "where the answer looked" });
  panel.setAttribute("role", "group");
  let layer = null;

  async function load() {
    panel.replaceChildren(element("p", { role: "status" }, "Looking …"));
    try {
      show(await attention({ ...body, layer }, key()));
    } catch (problem) {
      const again = element("button", { type: "button" }, "Try again");
      again.onclick = load;
      panel.replaceChildren(element("p", { className: "wrong", role: "alert" }, problem.message), again);
    }
  }

  function show(found) {
    const whole = element("button", { type: "button", ariaPressed: "true" }, "whole answer");
    const pieces = found.pieces.map((piece) => element("button", { type: "button", ariaPressed: "false" }, shown(piece)));
    const share = element("p");
    const [from, to] = [element("span"), element("span")];
    const layers = element("select", {}, element("option", { value: "" }, "all, their mean"));
    for (let index = 0; index < found.layers; index += 1) layers.append(element("option", { value: String(index) }, String(index + 1)));
    layers.value = layer === null ? "" : String(layer);
    layers.onchange = () => { layer = layers.value === "" ? null : Number(layers.value); load(); };
    const several = found.views.some((view) => view.image > 0);
    const canvases = found.views.map((view) => ({ view, canvas: element("canvas", { ariaHidden: "true" }) }));
    const views = element("div", { className: found.views.length < 3 ? "views few" : "views" });
    const bars = element("canvas", { className: "bars", role: "img" });
    for (const { view, canvas } of canvases) {
      const seen = element("img", { src: view.url, alt: `${caption(view, several)}, as the model sees it` });
      const inside = found.place === "none" ? [seen] : [seen, canvas];
      views.append(element("figure", {}, element("div", { className: "shown" }, ...inside), element("figcaption", {}, caption(view, several))));
    }

    function choose(index) {
      const tokens = index === null ? [...pieces.keys()] : [index];
      [whole, ...pieces].forEach((button, at) => { button.ariaPressed = String(at === (index === null ? 0 : index + 1)); });
      const maps = canvases.map(({ view }) => add(tokens.map((token) => view.weights[token] ?? [0])));
      const [least, most] = [maps.flat().reduce((a, b) => Math.min(a, b)), maps.flat().reduce((a, b) => Math.max(a, b))];
      if (found.place !== "none") canvases.forEach(({ view, canvas }, at) => paint(canvas, maps[at], view.columns, least, most));
      [from.textContent, to.textContent] = [percent(least), percent(most)];
      const visual = add(tokens.map((token) => found.visual[token]));
      if (found.place === "none") paintBars(bars, visual);
      const total = visual.reduce((sum, value) => sum + value, 0);
      share.textContent = `${percent(total)} of the attention went to ${visual.length} visual tokens, the rest to text.`;
      bars.ariaLabel = `attention to each of ${visual.length} visual tokens; the strongest is number ${visual.indexOf(visual.reduce((a, b) => Math.max(a, b))) + 1}`;
    }

    whole.onclick = () => choose(null);
    pieces.forEach((button, index) => { button.onclick = () => choose(index); });
    const notes = { attention: "The connector's tokens stand for no place of the image; shown are the patches to which they attended in it.",
      none: "The connector's tokens stand for no place of the image; each bar is one token." };
    panel.replaceChildren(
      element("p", {}, "Choose a token of the answer:"),
      element("div", { className: "pieces" }, whole, ...pieces),
      ...(notes[found.place] ? [element("p", {}, notes[found.place])] : []),
      views,
      ...(found.place === "none" ? [bars] : []),
      share,
      element("div", { className: "under" }, element("label", {}, "Layer of the LLM ", layers),
        ...(found.place === "none" ? [] : [element("span", { className: "legend" }, from, element("span", { className: "scale" }), to, " per cell")])),
    );
    choose(null);
  }

  load();
  return panel;
}
