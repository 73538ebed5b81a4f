"use strict";
// The page of a pylumiere server. It talks to the API under /v1 and to nothing else.

const $ = (id) => document.getElementById(id);
const KEY = "pylumiere-key";
const PAGE_SIZE = 24;
const MAX_STREAMS = 3; // a browser opens six connections to a server
const still = matchMedia("(prefers-reduced-motion: reduce)");

let key = sessionStorage.getItem(KEY) || "";
let model = null;
let oldest = null;
const cards = new Map(); // id -> Card

// ---- the API -----------------------------------------------------------------------------------------------------

class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function api(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try { message = (await response.json()).error.message; } catch { /* not from our server */ }
  if (response.status === 401) askForKey();
  throw new ApiError(response.status, message);
}

const json = async (path, options) => (await api(path, options)).json();

function askForKey() {
  const dialog = $("key-dialog");
  $("key-open").hidden = false;
  if (dialog.open) return;
  $("key-error").hidden = !key;
  $("key-error").textContent = "The server does not know this key.";
  $("key").value = "";
  dialog.showModal();
}

$("key-open").addEventListener("click", () => { $("key-error").hidden = true; $("key-dialog").showModal(); });
$("key-form").addEventListener("submit", () => {
  key = $("key").value.trim();
  sessionStorage.setItem(KEY, key);
  for (const card of cards.values()) card.drop();
  start();
});

function announce(text) { $("announce").textContent = text; }

async function* events(path, signal) {
  const response = await api(path, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const name = lines.find((line) => line.startsWith("event: "));
      const data = lines.find((line) => line.startsWith("data: "));
      if (name && data) yield [name.slice(7), JSON.parse(data.slice(6))];
    }
  }
}

// ---- a clip ------------------------------------------------------------------------------------------------------

class Card {
  constructor(video) {
    this.video = video;
    this.node = $("card").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.node.querySelector("." + name);
    this.frames = [];
    this.stream = null;
    this.urls = {};
    this.node.dataset.id = video.id;
    this.part("remove").addEventListener("click", () => this.remove());
    this.part("again").addEventListener("click", () => useAgain(this.video));
    this.part("play").addEventListener("click", () => this.toggle());
    this.part("download").addEventListener("click", (event) => this.download(event));
    this.draw();
  }

  get isActive() { return this.video.status === "queued" || this.video.status === "in_progress"; }

  update(video) {
    const before = this.video.status;
    this.video = video;
    this.draw();
    if (before !== video.status) {
      if (video.status === "completed") announce(`The clip "${short(video.prompt)}" is finished.`);
      if (video.status === "failed") announce(`The clip "${short(video.prompt)}" failed: ${video.error.message}`);
      if (video.status === "in_progress") announce(`The clip "${short(video.prompt)}" has started.`);
    }
  }

  draw() {
    const { video } = this;
    const { status } = video;
    this.node.className = `card is-${status}`;
    this.part("prompt").textContent = video.prompt;
    this.part("prompt").title = video.prompt;
    this.node.querySelector("progress").hidden = !this.isActive;
    this.node.querySelector("progress").value = video.progress;
    this.node.querySelector("progress").setAttribute("aria-label", `Progress of ${short(video.prompt)}`);
    this.part("badge").textContent = { queued: "waiting", in_progress: `${video.progress} %`, failed: "failed" }[status] || "";
    this.part("remove").textContent = this.isActive ? "Cancel" : "Delete";
    this.label("remove", this.isActive ? "Cancel" : "Delete");
    this.label("again", "Use again");
    this.part("download").hidden = status !== "completed";
    this.label("download", "Download");
    this.part("error").hidden = status !== "failed";
    this.part("error").textContent = video.error ? video.error.message : "";
    if (status !== "in_progress") {
      this.part("film").replaceChildren();
      this.part("facts").textContent = this.facts();
    }
    if (status === "completed") this.showThumbnail();
  }

  label(name, verb) { this.part(name).setAttribute("aria-label", `${verb}: ${short(this.video.prompt)}`); }

  facts() {
    const { seconds, size, seed, application, style } = this.video;
    const kind = [application === "text to video" ? "" : application, style ? `style ${style}` : ""].filter(Boolean);
    return `${kind.map((text) => `${text} · `).join("")}${Number(seconds)} s · ${size.replace("x", " × ")} · seed ${seed}`;
  }

  async showThumbnail() {
    this.stopFrames();
    if (this.urls.thumbnail) return;
    this.urls.thumbnail = "loading";
    try {
      this.urls.thumbnail = await this.load("thumbnail");
      const image = this.part("still");
      image.src = this.urls.thumbnail;
      image.alt = this.video.prompt;
      image.hidden = false;
      this.part("waiting").hidden = true;
      this.part("play").hidden = false;
      this.part("play").firstElementChild.textContent = `Play: ${short(this.video.prompt)}`;
    } catch { this.urls.thumbnail = null; }
  }

  async load(variant) {
    const response = await api(`/v1/videos/${this.video.id}/content?variant=${variant}`);
    return URL.createObjectURL(await response.blob());
  }

  async toggle() {
    const clip = this.part("clip");
    if (!clip.hidden && !clip.paused) {
      clip.pause();
      this.node.classList.remove("is-playing");
      this.part("play").firstElementChild.textContent = `Play: ${short(this.video.prompt)}`;
      return;
    }
    try {
      this.urls.video = this.urls.video || await this.load("video");
    } catch (error) { announce(error.message); return; }
    if (!clip.src) clip.src = this.urls.video;
    clip.hidden = false;
    this.part("still").hidden = true;
    await clip.play();
    this.node.classList.add("is-playing");
    this.part("play").firstElementChild.textContent = `Pause: ${short(this.video.prompt)}`;
  }

  async download(event) {
    const link = this.part("download");
    if (link.href) return;
    event.preventDefault();
    try {
      this.urls.video = this.urls.video || await this.load("video");
    } catch (error) { announce(error.message); return; }
    link.href = this.urls.video;
    link.download = `${short(this.video.prompt).replace(/[^A-Za-z0-9]+/g, "-").slice(0, 40) || "clip"}-${this.video.seed}.mp4`;
    link.click();
  }

  async remove() {
    try {
      await api(`/v1/videos/${this.video.id}`, { method: "DELETE" });
    } catch (error) {
      if (error.status !== 404) { announce(error.message); return; }
    }
    announce(`${this.isActive ? "Cancelled" : "Deleted"}: ${short(this.video.prompt)}`);
    const next = this.node.nextElementSibling || this.node.previousElementSibling;
    this.drop();
    (next ? next.querySelector(".remove") : $("clips-title")).focus();
    count();
  }

  drop() {
    this.unfollow();
    this.stopFrames();
    Object.values(this.urls).forEach((url) => url && URL.revokeObjectURL(url));
    this.node.remove();
    cards.delete(this.video.id);
  }

  // Live: progress and frames as they become final.
  async follow() {
    if (this.stream) return;
    this.stream = new AbortController();
    try {
      for await (const [name, data] of events(`/v1/videos/${this.video.id}/events`, this.stream.signal)) {
        if (name === "progress") this.showProgress(data);
        else if (name === "preview") this.showFrame(data);
        else if (name === "deleted") { this.drop(); count(); return; }
        else this.update(data);
      }
    } catch (error) {
      if (error.name !== "AbortError" && error.status === 404) { this.drop(); count(); }
    } finally {
      this.stream = null;
      this.stopFrames();
    }
  }

  unfollow() { if (this.stream) this.stream.abort(); this.stream = null; }

  showProgress({ stage, step, steps, frames_final, num_frames, seconds_left, percent }) {
    if (this.video.status !== "in_progress") return;
    this.video.progress = percent;
    this.node.querySelector("progress").value = percent;
    this.part("badge").textContent = `${percent} %`;
    const parts = frames_final > 0 && frames_final < num_frames
      ? [`${stage}, ${frames_final} of ${num_frames} frames final`]
      : [`${stage}, step ${step} of ${steps}`];
    if (seconds_left !== null && seconds_left >= 1) parts.push(`${Math.ceil(seconds_left)} s left`);
    this.part("facts").textContent = parts.join(" · ");
    if (frames_final > 0 && frames_final < num_frames) {
      this.node.querySelector("progress").hidden = true;
      const film = this.part("film");
      while (film.childElementCount < num_frames) film.append(document.createElement("span"));
      for (let i = 0; i < frames_final; i++) film.children[i].className = "final";
    }
  }

  showFrame({ frame, image }) {
    if (this.frames.length && frame <= this.frames[this.frames.length - 1].frame) this.frames = []; // it runs again
    this.frames.push({ frame, image });
    const view = this.part("still");
    view.hidden = false;
    view.alt = `Frames of: ${this.video.prompt}`;
    this.part("waiting").hidden = true;
    if (still.matches) { view.src = image; return; }
    if (this.timer) return;
    let index = 0;
    this.timer = setInterval(() => {
      index = (index + 1) % this.frames.length;
      view.src = this.frames[index].image;
    }, 90);
    view.src = image;
  }

  stopFrames() { clearInterval(this.timer); this.timer = null; }
}

const short = (text) => (text.length > 60 ? text.slice(0, 57) + "..." : text);

// ---- the gallery -------------------------------------------------------------------------------------------------

function place(video, atTop) {
  const known = cards.get(video.id);
  if (known) { if (!known.stream) known.update(video); return known; }
  const card = new Card(video);
  cards.set(video.id, card);
  if (atTop) $("gallery").prepend(card.node); else $("gallery").append(card.node);
  return card;
}

async function loadPage() {
  const after = oldest ? `&after=${oldest}` : "";
  const page = await json(`/v1/videos?limit=${PAGE_SIZE}${after}`);
  page.data.forEach((video) => place(video, false));
  if (page.last_id) oldest = page.last_id;
  $("load-more").hidden = !page.has_more;
  count();
}

function count() {
  const active = [...cards.values()].filter((card) => card.isActive).length;
  $("empty").hidden = cards.size > 0;
  $("count").textContent = cards.size ? `${cards.size}${$("load-more").hidden ? "" : "+"}` : "";
  $("queue").hidden = active === 0;
  $("queue").textContent = `${active} in progress`;
}

// Every two seconds: what waits is asked about, what runs is followed.
async function tick() {
  try {
    const active = [...cards.values()].filter((card) => card.isActive);
    if (active.some((card) => !card.stream)) {
      const page = await json("/v1/videos?limit=100");
      const known = new Map(page.data.map((video) => [video.id, video]));
      for (const card of active) {
        if (card.stream) continue;
        if (known.has(card.video.id)) card.update(known.get(card.video.id));
      }
    }
    let streams = active.filter((card) => card.stream).length;
    const order = { in_progress: 0, queued: 1 };
    for (const card of active.sort((a, b) => order[a.video.status] - order[b.video.status])) {
      if (card.isActive && !card.stream && streams < MAX_STREAMS) { streams++; card.follow().then(count); }
    }
    count();
  } catch { /* said where it matters; the next tick tries again */ }
}

$("load-more").addEventListener("click", () => loadPage().catch((error) => announce(error.message)));

// ---- the form ----------------------------------------------------------------------------------------------------

function fillForm() {
  const { defaults, limits } = model;
  const [width, height] = defaults.size.split("x");
  const set = (id, values) => Object.assign($(id), values);
  set("num_frames", { min: limits.num_frames.step, max: limits.num_frames.most, step: limits.num_frames.step, value: defaults.num_frames });
  $("style-row").hidden = model.styles.length === 0;
  $("style").replaceChildren(new Option("none", ""), ...model.styles.map((name) => new Option(name, name)));
  set("width", { placeholder: width, min: limits.size.step, max: limits.size.width, step: limits.size.step });
  set("height", { placeholder: height, min: limits.size.step, max: limits.size.height, step: limits.size.step });
  set("num_inference_steps", { placeholder: defaults.num_inference_steps });
  set("guidance_scale", { placeholder: defaults.guidance_scale });
  $("model-name").textContent = model.id;
  showLength();
  showApplication();
}

function showLength() {
  const frames = Number($("num_frames").value);
  $("length").textContent = `${Math.round(frames / model.defaults.fps * 100) / 100} s`;
  $("num_frames").setAttribute("aria-valuetext", `${$("length").textContent}, ${frames} frames`);
}
$("num_frames").addEventListener("input", showLength);

function useAgain(video) {
  $("application").value = { "text to video": "text", "image to video": "image", "video to video": "video", extension: "video" }[video.application] || video.application;
  $("prompt").value = video.prompt;
  $("style").value = video.style || "";
  $("style_strength").value = video.style_strength;
  $("strength").value = video.strength;
  $("loop").checked = video.loop;
  $("fit").value = video.fit;
  for (const edge of EDGES) $(`expand-${edge}`).value = (video.expand || {})[edge] || 0;
  showApplication();
  $("seed").value = video.seed;
  $("num_frames").value = video.num_frames;
  [$("width").value, $("height").value] = video.size.split("x");
  $("num_inference_steps").value = video.num_inference_steps;
  $("guidance_scale").value = video.guidance_scale;
  $("sampler").value = video.sampler;
  $("negative_prompt").value = video.negative_prompt;
  showLength();
  $("prompt").focus();
  scrollTo({ top: 0, behavior: still.matches ? "auto" : "smooth" });
  announce(needs().inputs ? "The form holds the settings of that clip. Choose its files again." : "The form holds the settings of that clip.");
}

// ---- pictures, clips and masks ------------------------------------------------------------------------------------

const PICTURES = "image/png,image/jpeg,image/webp";
const EDGES = ["left", "right", "top", "bottom"];
const APPLICATIONS = {
  text: { note: "" },
  image: { note: "The clip begins with a picture.", inputs: true, reference: "First frame (a picture)", accept: PICTURES },
  keyframes: { note: "The clip passes through given frames.", inputs: true, keyframes: true },
  cinemagraph: { note: "A part of a picture moves; the rest stands still.", inputs: true, reference: "Picture", accept: PICTURES, mask: "what should move" },
  inpainting: { note: "A part of a clip is made anew; the rest stays as it is.", inputs: true, reference: "Clip", accept: "video/*,image/gif", mask: "what should be made anew" },
  outpainting: { note: "A picture or clip is shown smaller, and what lies beside it is made.", inputs: true, reference: "Picture or clip", accept: `${PICTURES},video/*,image/gif`, expand: true },
  video: { note: "A clip is made again, after the prompt.", inputs: true, reference: "Clip", accept: "video/*,image/gif", strength: true },
};
const needs = () => APPLICATIONS[$("application").value];
let isClip = false; // what was chosen; a clip brings its own length

const painter = new Painter({
  box: $("canvas-box"), picture: $("picture"), mask: $("mask-canvas"), brush: $("brush"), say: (text) => announce(text),
});

function showApplication() {
  const { note, inputs, reference, accept, mask, keyframes, expand, strength } = needs();
  $("application-note").textContent = note;
  $("inputs").hidden = !inputs;
  $("reference-field").hidden = !reference;
  if (reference) { $("reference-label").textContent = reference; $("input_reference").accept = accept; }
  $("keyframes-field").hidden = !keyframes;
  if (keyframes && !$("keyframes").childElementCount) { addKeyframe(0); addKeyframe(model ? model.defaults.num_frames - 1 : 0); }
  $("expand-field").hidden = !expand;
  $("strength-field").hidden = !strength;
  $("mask-canvas").setAttribute("aria-label", `Mask: paint ${mask || "here"}`);
  showPicture();
  showValues();
}

// The chosen picture, or the first frame of the chosen clip.
async function showPicture() {
  const file = $("input_reference").files[0];
  const { reference, mask } = needs();
  const note = (text) => { $("reference-note").textContent = text; };
  note("");
  $("painter").hidden = true;
  isClip = false;
  if (reference && file) {
    const url = URL.createObjectURL(file);
    try {
      const [source, width, height] = await firstFrame(url, file.type);
      if (file !== $("input_reference").files[0]) return;
      painter.show(source, width, height);
      $("painter").hidden = false;
      note(`${width} × ${height}`);
    } catch {
      isClip = !file.type.startsWith("image/");
      note("This browser cannot show it. The server may still read it" + (mask ? "; give the mask as a file." : "."));
      painter.reset();
      $("painter").hidden = !mask;
    } finally { URL.revokeObjectURL(url); }
  }
  for (const id of ["mask-canvas", "brush-field", "tools", "painter-help"]) $(id).hidden = !mask || (id !== "painter-help" && !painter.size);
  $("painter").classList.toggle("is-still", !mask);
  $("canvas-box").hidden = !painter.size;
  document.querySelector(".mask-file").hidden = !mask;
  $("length-field").hidden = isClip;
}

async function firstFrame(url, type) {
  if (type.startsWith("image/")) {
    const image = new Image();
    image.src = url;
    await image.decode();
    isClip = type === "image/gif";
    return [image, image.naturalWidth, image.naturalHeight];
  }
  const clip = Object.assign(document.createElement("video"), { muted: true, preload: "auto", src: url });
  await new Promise((done, failed) => { clip.onloadeddata = done; clip.onerror = failed; });
  isClip = true;
  if (!clip.videoWidth) throw new Error("no picture");
  return [clip, clip.videoWidth, clip.videoHeight];
}

function addKeyframe(frame) {
  const node = $("keyframe").content.firstElementChild.cloneNode(true);
  const [number, file] = node.querySelectorAll("input");
  number.value = frame;
  node.querySelector(".remove-frame").addEventListener("click", () => {
    node.remove();
    nameKeyframes();
    $("add-keyframe").focus();
  });
  $("keyframes").append(node);
  nameKeyframes();
  return file;
}

function nameKeyframes() {
  [...$("keyframes").children].forEach((node, index) => {
    const [number, file] = node.querySelectorAll("input");
    number.setAttribute("aria-label", `Number of given frame ${index + 1}`);
    file.setAttribute("aria-label", `Picture of given frame ${index + 1}`);
    node.querySelector(".remove-frame").setAttribute("aria-label", `Remove given frame ${index + 1}`);
  });
}

// Appends what the application needs; returns the message and the control where something is missing.
async function addInputs(form) {
  const { reference, mask, keyframes, expand, strength } = needs();
  if (reference) {
    const file = $("input_reference").files[0];
    if (!file) return [`Choose a file: ${reference.toLowerCase()}.`, "input_reference"];
    form.append("input_reference", file);
    form.append("fit", $("fit").value);
  }
  if (mask) {
    const file = $("mask-file").files[0];
    if (!file && (!painter.size || painter.painted() === 0)) return [`Paint ${mask} first.`, painter.size ? "mask-canvas" : "input_reference"];
    form.append("mask", file || await painter.png(), "mask");
  }
  if (keyframes) {
    const rows = [...$("keyframes").children].map((node) => node.querySelectorAll("input"));
    const full = rows.filter(([, file]) => file.files[0]);
    if (!full.length) return ["Choose a picture for at least one frame.", "add-keyframe"];
    for (const [number, file] of full) form.append(`keyframes[${number.value || 0}]`, file.files[0]);
    form.append("fit", $("fit").value);
  }
  if (expand) form.append("expand", EDGES.map((edge) => `${edge}=${$(`expand-${edge}`).value || 0}`).join(","));
  if (strength) form.append("strength", $("strength").value);
  return null;
}

function showValues() {
  const percent = (id) => `${Math.round(100 * $(id).value)} %`;
  $("strength-value").textContent = percent("strength");
  $("style-value").textContent = percent("style_strength");
  $("style-strength-field").hidden = !$("style").value;
  painter.part = $("brush-size").value / 100;
  $("brush-value").textContent = `${$("brush-size").value} %`;
}

$("application").addEventListener("change", showApplication);
$("input_reference").addEventListener("change", showPicture);
$("add-keyframe").addEventListener("click", () => addKeyframe(0).focus());
for (const id of ["strength", "style_strength", "style", "brush-size"]) $(id).addEventListener("input", showValues);
for (const id of ["paint", "erase"]) {
  $(id).addEventListener("click", () => {
    painter.erases = id === "erase";
    $("paint").setAttribute("aria-pressed", String(!painter.erases));
    $("erase").setAttribute("aria-pressed", String(painter.erases));
  });
}
$("undo").addEventListener("click", () => painter.undo());
$("invert").addEventListener("click", () => painter.whole("invert"));
$("clear").addEventListener("click", () => painter.whole("clear"));

function showError(text) {
  $("form-error").textContent = text;
  $("form-error").hidden = !text;
  $("prompt").setAttribute("aria-invalid", text ? "true" : "false");
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  showError("");
  const form = new FormData();
  const value = (id) => $(id).value.trim();
  if (!value("prompt")) { showError("Write a prompt first."); $("prompt").focus(); return; }
  const missing = await addInputs(form);
  if (missing) { showError(missing[0]); $(missing[1]).focus(); return; }
  if (!$("length-field").hidden) form.append("num_frames", value("num_frames"));
  for (const name of ["prompt", "seed", "num_inference_steps", "guidance_scale", "sampler", "negative_prompt"]) {
    if (value(name)) form.append(name, value(name));
  }
  if (value("width") || value("height")) {
    form.append("size", `${value("width") || $("width").placeholder}x${value("height") || $("height").placeholder}`);
  }
  if ($("style").value) { form.append("style", $("style").value); form.append("style_strength", $("style_strength").value); }
  if ($("loop").checked) form.append("loop", "true");
  $("submit").disabled = true;
  try {
    const card = place(await json("/v1/videos", { method: "POST", body: form }), true);
    card.follow().then(count);
    count();
    announce("The clip was accepted.");
  } catch (error) {
    showError(error.message);
  } finally {
    $("submit").disabled = false;
  }
});

$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
});

// ---- start -------------------------------------------------------------------------------------------------------

async function start() {
  oldest = null;
  try {
    model = (await json("/v1/models")).data[0];
    $("key-open").hidden = !key;
    fillForm();
    await loadPage();
    tick();
  } catch (error) {
    if (error.status !== 401) showError(error.message);
  }
}

start();
setInterval(tick, 2000);
