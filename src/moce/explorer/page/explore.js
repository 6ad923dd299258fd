// The page of moce explore: asks the server of this page only, and keeps nothing.
import { Plot } from "./plot.js";

const byId = (name) => document.getElementById(name);
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const percent = (share) => `${Math.round(100 * share)}%`;

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { "X-Moce": "1", ...options.headers } });
  } catch {
    throw new Error("moce explore has ended: start it again, and load this page again");
  }
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

const state = { facts: null, map: null, plot: null, drop: null, strategy: "auto", answer: null };

// --- waiting for the map --------------------------------------------------------------------------

const STAGES = {
  starting: ["Starting", ""],
  features: ["Looking at the images", "Every image goes through the encoder once. The result is kept: next time the page opens at once."],
  map: ["Drawing the map", "Images with like features are put beside each other (t-SNE). This takes a minute or less, and is kept, too."],
};

async function wait() {
  for (;;) {
    const status = await ask("/api/status");
    showFacts(status.facts);
    if (status.error) throw new Error(status.error);
    if (status.ready) return;
    const [name, hint] = STAGES[status.stage];
    const counting = status.stage === "features" && status.total;
    byId("stagename").textContent = counting
      ? `${name}: ${status.done.toLocaleString("en")} of ${status.total.toLocaleString("en")}` : name;
    byId("stagehint").textContent = hint;
    const bar = byId("progress");
    if (counting) Object.assign(bar, { max: status.total, value: status.done });
    else bar.removeAttribute("value");
    await new Promise((resolve) => setTimeout(resolve, 400));
  }
}

function showFacts(facts) {
  state.facts = facts;
  const parts = [facts.run, counted(facts.images - (facts.skipped || 0), "image"), counted(facts.clusters, "cluster")];
  if (facts.skipped) parts.splice(2, 0, `${counted(facts.skipped, "unreadable one")} left out`);
  if (facts.experts) parts.push(`${counted(facts.experts, "expert")} in blocks ${facts.blocks.join(" and ")}`, counted(facts.routes, "route"));
  else parts.push("no experts: moce train gives it some");
  byId("facts").textContent = parts.join(" · ");
}

async function start() {
  enableDrop(false);
  await wait();
  const map = await ask("/api/map");
  state.map = map;
  state.plot = new Plot(byId("stage"), map, { hover: showTip, click: (point) => showCluster(map.clusterOf[point], point).catch(report) });
  const select = byId("coloring");
  map.colorings.forEach((coloring, number) => select.append(new Option(coloring.title, number)));
  select.onchange = () => color(Number(select.value));
  byId("whole").onclick = () => state.plot.reset();
  byId("waiting").hidden = true;
  byId("toolbar").hidden = byId("legend").hidden = false;
  color(0);
  enableDrop(true);
  window.explorer = state; // for tests and the curious
}

// --- colors, legend, tip --------------------------------------------------------------------------

const MOST_IN_LEGEND = 14;

function color(number) {
  const coloring = state.map.colorings[number];
  state.plot.color(coloring);
  const legend = byId("legend");
  legend.replaceChildren();
  coloring.names.slice(0, MOST_IN_LEGEND).forEach((name, group) => {
    const dot = element("i");
    dot.style.background = state.plot.colors[group];
    const button = element("button", { type: "button" }, dot, name, element("b", {}, coloring.counts[group].toLocaleString("en")));
    button.onclick = () => {
      const on = button.classList.toggle("on");
      for (const other of legend.querySelectorAll("button")) if (other !== button) other.classList.remove("on");
      state.plot.single(on ? group : null);
    };
    legend.append(button);
  });
  const more = coloring.names.length - MOST_IN_LEGEND;
  if (more > 0) legend.append(element("p", {}, `and ${more} more`));
}

function showTip(point, x, y) {
  const tip = byId("tip");
  if (point === null) {
    tip.hidden = true;
    return;
  }
  const { map } = state;
  if (tip.dataset.point !== String(point)) {
    tip.dataset.point = point;
    const image = tip.querySelector("img");
    image.removeAttribute("src");
    image.src = `/api/thumbnail/${point}?size=138`;
    const caption = tip.querySelector("figcaption");
    caption.replaceChildren(map.ids[point], element("small", {}, `cluster ${map.clusterOf[point]}`));
    if (map.labels && map.labels[point]) caption.append(element("small", {}, `label ${map.labels[point]}`));
  }
  tip.hidden = false;
  const stage = byId("stage").getBoundingClientRect();
  tip.style.left = `${x + 18 + tip.offsetWidth > stage.width ? Math.max(0, x - 18 - tip.offsetWidth) : x + 18}px`;
  tip.style.top = `${Math.max(0, Math.min(y - 20, stage.height - tip.offsetHeight - 4))}px`;
}

// --- tabs -----------------------------------------------------------------------------------------

function open(name) {
  for (const other of ["own", "cluster"]) {
    byId(other).hidden = other !== name;
    byId(`${other}tab`).setAttribute("aria-selected", String(other === name));
  }
  document.querySelector("aside").scrollTo(0, 0);
}

// --- a cluster ------------------------------------------------------------------------------------

async function showCluster(number, point = null) {
  const found = await ask(`/api/cluster/${number}`);
  state.plot.mark(found.points, point);
  state.plot.only(number);
  const panel = byId("cluster");
  byId("clustertab").textContent = `Cluster ${number}`;
  open("cluster");
  const facts = [counted(found.images, "image") + " on the map", `trained on ${found.trained_on.toLocaleString("en")}`];
  if (found.similarity !== null) facts.push(`mean similarity to its centroid ${found.similarity.toFixed(2)}`);
  const close = element("button", { type: "button", textContent: "Show the whole map in color" });
  close.onclick = () => {
    state.plot.mark([], null);
    state.plot.only(null);
  };
  const title = element("div", { className: "row" }, element("h2", {}, `Cluster ${number}`), close);
  panel.replaceChildren(title, element("p", { className: "note" }, facts.join(" · ")));
  if (found.labels.length) {
    panel.append(element("p", { className: "note" }, "labels: " + found.labels.map(([name, count]) => `${name} (${count})`).join(", ")));
  }
  if (found.route !== null) panel.append(...expertsOf(found));
  panel.append(element("h3", {}, found.points.length < found.images ? `The ${found.points.length} most typical images` : "Its images, most typical first"));
  panel.append(gallery(found.points.map((other) => ({ point: other, on: other === point }))));
}

function expertsOf(found) {
  const bars = element("div", { className: "bars" });
  for (const { block, expert, gate } of found.experts) {
    const bar = element("i");
    bar.style.width = percent(gate);
    bars.append(element("span", {}, `block ${block}: expert ${expert}`), bar, element("b", {}, `gate ${gate.toFixed(2)}`));
  }
  const share = percent(found.route_images / found.all_images);
  return [
    element("h3", {}, `Its experts: route ${found.route}`),
    bars,
    element("p", { className: "note" }, `This route has seen ${share} of the training images.`),
    exportForm(`route-${found.route}`, () => ({ route: found.route }), `Export route ${found.route}`),
  ];
}

function gallery(items) {
  const images = element("div", { className: "images" });
  for (const { point, on, text } of items) {
    const image = element("img", { loading: "lazy", alt: state.map.ids[point], title: state.map.ids[point], src: `/api/thumbnail/${point}?size=96` });
    const button = element("button", { type: "button", className: on ? "on" : "" }, image);
    if (text) button.append(element("span", {}, text));
    button.onclick = () => showCluster(state.map.clusterOf[point], point).catch(report);
    images.append(button);
  }
  return images;
}

// --- images of the user ---------------------------------------------------------------------------

function enableDrop(on) {
  byId("drop").setAttribute("aria-disabled", String(!on));
  byId("files").disabled = !on;
}

function report(error) {
  const problem = byId("dropproblem");
  problem.hidden = !error;
  problem.textContent = error ? error.message : "";
}

async function drop(files) {
  if (!files.length || byId("files").disabled) return;
  report(null);
  const form = new FormData();
  for (const file of files) form.append("files", file, file.name);
  const note = byId("dropnote"), before = note.textContent;
  note.textContent = `Looking at ${counted(files.length, "file")} …`;
  enableDrop(false);
  try {
    const { key } = await ask("/api/drop", { method: "POST", body: form });
    Object.assign(state, { drop: key, strategy: "auto" });
    await lookUp();
  } catch (error) {
    report(error);
  } finally {
    note.textContent = before;
    enableDrop(true);
  }
}

async function lookUp() {
  const answer = await ask(`/api/drop/${state.drop}?strategy=${state.strategy}`);
  state.answer = answer;
  state.plot.mark([], null);
  state.plot.only(null);
  showTip(null);
  state.plot.stars(answer.images.map((image) => image.place));
  const panel = byId("answer");
  panel.hidden = false;
  open("own");
  panel.replaceChildren();
  if (answer.skipped.length) {
    const lines = answer.skipped.map(([name, reason]) => element("li", {}, `${name}: ${reason}`));
    panel.append(element("details", { className: "problem", id: "unreadable" },
      element("summary", {}, `without a vote: ${counted(answer.skipped.length, "file")} that cannot be read as images`),
      element("ul", {}, ...lines)));
  }
  if (answer.choice) panel.append(...verdict(answer.choice));
  const images = element("div", { className: "images", id: "yours" });
  answer.images.forEach((image, row) => {
    const button = element("button", { type: "button", title: image.name },
      element("img", { alt: image.name, src: `/api/drop/${state.drop}/thumbnail/${row}?size=96` }),
      element("span", {}, `cluster ${image.cluster}`));
    button.onclick = () => showImage(row, images).catch(report);
    images.append(button);
  });
  panel.append(element("h3", {}, answer.images.length === 1 ? "Your image" : `Your ${answer.images.length} images: click one`), images, element("div", { id: "one" }));
  if (answer.choice) {
    panel.append(element("h3", {}, "Export this backbone"),
      exportForm("my-backbone", () => ({ drop: state.drop, strategy: state.strategy }), "Export"));
  }
  await showImage(0, images);
}

function verdict(choice) {
  const select = element("select", { id: "strategy", title: "How experts are chosen" });
  for (const name of ["auto", "route", "merge", "generalist"]) select.append(new Option(name, name, false, name === state.strategy));
  select.onchange = () => {
    state.strategy = select.value;
    lookUp().catch(report);
  };
  const all = choice.votes.reduce((sum, [, count]) => sum + count, 0);
  const bars = element("div", { className: "bars", id: "votes" });
  for (const [route, count] of choice.votes.filter(([, number]) => number)) {
    const bar = element("i", { className: route === choice.route ? "" : "other" });
    bar.style.width = percent(count / all);
    bars.append(element("span", {}, `route ${route}`), bar, element("b", {}, counted(count, "vote")));
  }
  const silent = choice.votes.filter(([, number]) => !number).length;
  const alike = `similarity to their centroids ${choice.similarity.toFixed(2)}; of the training images ${choice.training_similarity.toFixed(2)}`;
  return [
    element("div", { className: "verdict", id: "choice" }, "Chosen experts", element("strong", {}, choice.name), choice.why),
    element("div", { className: "row" }, element("label", {}, "Strategy ", select), element("span", { className: "hint" }, alike)),
    element("h3", {}, "Votes"), bars,
    ...(silent ? [element("p", { className: "note" }, `${counted(silent, "route")} without a vote`)] : []),
  ];
}

async function showImage(row, images) {
  [...images.children].forEach((button, number) => button.classList.toggle("on", number === row));
  const image = state.answer.images[row], one = byId("one"), key = state.drop, strategy = state.strategy;
  const wait = element("p", { className: "note" }, "Filling in masked patches …");
  const cluster = element("button", { type: "button" }, `cluster ${image.cluster}`);
  cluster.onclick = () => showCluster(image.cluster).catch(report);
  one.replaceChildren(
    element("p", { className: "note" }, `${image.name}: `, cluster, ` similarity to its centroid ${image.similarity.toFixed(2)}`),
    element("h3", {}, state.facts.training ? "Nearest training images" : "Nearest images of the map"),
    gallery(image.nearest.map(({ point, similarity }) => ({ point, text: similarity.toFixed(2) }))),
    element("h3", {}, "Masked, and filled in"), wait);
  state.plot.star(row);
  const found = await ask(`/api/drop/${key}/pictures/${row}?strategy=${strategy}`);
  if (!wait.isConnected) return; // another image was clicked meanwhile
  const errors = found.pictures.map((picture) => picture.error).filter((error) => error !== null);
  const grid = element("div", { className: "pictures", id: "pictures" });
  for (const { label, error, picture } of found.pictures) {
    const best = error !== null && error === Math.min(...errors);
    const caption = element("figcaption", {}, label);
    if (error !== null) caption.append(element("small", {}, `error ${error.toFixed(3)}${best ? ", the lowest" : ""}`));
    grid.append(element("figure", { className: best ? "best" : "" }, element("img", { src: picture, alt: label }), caption));
  }
  const first = grid.querySelector("img");
  if (first) first.onload = () => grid.classList.toggle("small", first.naturalWidth < 96);
  const note = found.note ? [element("p", { className: "note" }, found.note)] : [];
  wait.replaceWith(...(found.pictures.length ? [grid] : []), ...note);
}

// --- export ---------------------------------------------------------------------------------------

function exportForm(name, what, text) {
  const input = element("input", { type: "text", value: name, ariaLabel: "Name of the folder" });
  const format = element("select", { title: "For which library" });
  for (const kind of ["timm", "transformers", "torch", "onnx"]) format.append(new Option(kind));
  const button = element("button", { type: "button", className: "go", textContent: text });
  const result = element("div", { className: "exported", role: "status" });
  button.onclick = async () => {
    button.disabled = true;
    result.replaceChildren(element("p", { className: "note" }, "Writing …"));
    try {
      const body = JSON.stringify({ ...what(), name: input.value, format: format.value });
      const done = await ask("/api/export", { method: "POST", body });
      result.replaceChildren(element("p", { className: "note" }, `Written to ${done.folder}. Load it:`), element("pre", {}, done.load_it));
    } catch (error) {
      result.replaceChildren(element("p", { className: "problem" }, error.message));
    }
    button.disabled = false;
  };
  return element("div", {}, element("div", { className: "row" }, input, format, button), result);
}

// --- the way in -----------------------------------------------------------------------------------

for (const name of ["own", "cluster"]) byId(`${name}tab`).onclick = () => open(name);
const area = byId("drop"), files = byId("files");
area.onclick = () => files.click();
area.onkeydown = (event) => {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    files.click();
  }
};
files.onclick = (event) => event.stopPropagation();
files.onchange = async () => {
  await drop([...files.files]);
  files.value = "";
};
window.ondragover = (event) => {
  event.preventDefault();
  area.classList.add("over");
};
window.ondragleave = () => area.classList.remove("over");
window.ondrop = (event) => {
  event.preventDefault();
  area.classList.remove("over");
  drop([...event.dataTransfer.files]);
};

start().catch((error) => {
  byId("stagename").textContent = error.message;
  byId("stagename").className = "problem";
  byId("progress").hidden = true;
  byId("stagehint").textContent = "";
});
