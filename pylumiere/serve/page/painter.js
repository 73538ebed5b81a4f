"use strict";
// A mask over a picture: painted by mouse, finger, pen or keyboard; undone stroke by stroke.

// Stands out from every picture.
function stripes(canvas) {
  const side = Math.max(4, 4 * Math.round(canvas.width / 96));
  const tile = document.createElement("canvas");
  tile.width = tile.height = side;
  const context = tile.getContext("2d");
  context.fillStyle = "#ff2d7e";
  context.fillRect(0, 0, side, side);
  context.fillStyle = "#fff";
  for (const x of [-side, 0, side]) {
    context.beginPath();
    [[x, side], [x + side, 0], [x + 1.5 * side, 0], [x + side / 2, side]].forEach(([a, b]) => context.lineTo(a, b));
    context.fill();
  }
  return canvas.getContext("2d").createPattern(tile, "repeat");
}

class Painter {
  static SIDE = 1024; // most pixels a side while painting; the mask leaves in the picture's own size
  static UNDO = 200; // strokes that can be undone

  // Elements: box around picture and mask canvases, brush; say(text) tells screen readers.
  constructor({ box, picture, mask, brush, say }) {
    Object.assign(this, { box, picture, mask, brush, say });
    this.erases = false;
    this.part = 0.12; // of the shorter side
    this.reset();
    mask.addEventListener("pointerdown", (event) => this.down(event));
    mask.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) mask.addEventListener(name, () => this.up());
    mask.addEventListener("pointerleave", () => { if (document.activeElement !== mask) brush.hidden = true; });
    mask.addEventListener("keydown", (event) => this.key(event));
    mask.addEventListener("keyup", (event) => { if (event.key === " ") { event.preventDefault(); this.up(); this.tell(); } });
    mask.addEventListener("focus", () => { if (mask.matches(":focus-visible")) this.showBrush(); });
    mask.addEventListener("blur", () => { this.up(); brush.hidden = true; });
  }

  reset() {
    this.size = null;
    this.start = null; // the mask before the first of `strokes`
    this.strokes = [];
    this.stroke = null;
  }

  // Shows a picture or a clip's frame; the mask begins empty.
  show(source, width, height) {
    const scale = Math.min(1, Painter.SIDE / Math.max(width, height));
    this.reset();
    this.size = [width, height];
    for (const canvas of [this.picture, this.mask]) {
      canvas.width = Math.max(1, Math.round(width * scale));
      canvas.height = Math.max(1, Math.round(height * scale));
    }
    this.picture.getContext("2d").drawImage(source, 0, 0, this.picture.width, this.picture.height);
    this.box.style.maxWidth = `calc(46vh * ${width / height})`;
    this.stripes = stripes(this.mask);
    this.at = [this.mask.width / 2, this.mask.height / 2];
  }

  get diameter() { return Math.max(2, this.part * Math.min(this.mask.width, this.mask.height)); }

  // ---- strokes ---------------------------------------------------------------------------------------------------

  draw(stroke) {
    const context = this.mask.getContext("2d");
    const { width, height } = this.mask;
    context.globalCompositeOperation = { paint: "source-over", erase: "destination-out", clear: "destination-out", invert: "source-out" }[stroke.kind];
    context.fillStyle = context.strokeStyle = this.stripes;
    if (stroke.kind === "clear" || stroke.kind === "invert") { context.fillRect(0, 0, width, height); return; }
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = stroke.diameter;
    context.beginPath();
    const [[x, y], ...rest] = stroke.points;
    context.moveTo(x, y);
    for (const [x1, y1] of rest.length ? rest : [[x, y + 0.01]]) context.lineTo(x1, y1);
    context.stroke();
  }

  begin() {
    this.stroke = { kind: this.erases ? "erase" : "paint", diameter: this.diameter, points: [[...this.at]] };
    this.keep(this.stroke);
    this.draw(this.stroke);
  }

  go() {
    const { points } = this.stroke;
    points.push([...this.at]);
    this.draw({ ...this.stroke, points: points.slice(-2) });
  }

  up() { this.stroke = null; }

  // The oldest strokes become part of the mask that undoing starts from.
  keep(stroke) {
    this.strokes.push(stroke);
    if (this.strokes.length <= Painter.UNDO) return;
    this.replay(this.strokes.splice(0, Painter.UNDO / 2));
    this.start = document.createElement("canvas");
    [this.start.width, this.start.height] = [this.mask.width, this.mask.height];
    this.start.getContext("2d").drawImage(this.mask, 0, 0);
    this.strokes.forEach((one) => this.draw(one));
  }

  replay(strokes) {
    const context = this.mask.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, this.mask.width, this.mask.height);
    if (this.start) context.drawImage(this.start, 0, 0);
    strokes.forEach((stroke) => this.draw(stroke));
  }

  undo() { if (this.size && this.strokes.pop()) this.replay(this.strokes); this.tell(); }
  whole(kind) { if (!this.size) return; this.keep({ kind }); this.draw({ kind }); this.tell(); }

  // ---- pointer and keys ------------------------------------------------------------------------------------------

  place(event) {
    const box = this.mask.getBoundingClientRect();
    this.at = [(event.clientX - box.left) / box.width * this.mask.width, (event.clientY - box.top) / box.height * this.mask.height];
    this.showBrush();
  }

  down(event) {
    if (event.button !== 0) return;
    this.mask.setPointerCapture(event.pointerId);
    this.place(event);
    this.begin();
  }

  move(event) {
    for (const one of event.getCoalescedEvents?.().length ? event.getCoalescedEvents() : [event]) {
      this.place(one);
      if (this.stroke) this.go();
    }
  }

  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === " ") {
      event.preventDefault();
      if (!this.stroke) { this.showBrush(); this.begin(); }
    } else if (step) {
      event.preventDefault();
      const far = this.diameter * (event.shiftKey ? 1 : 0.25);
      const most = [this.mask.width, this.mask.height];
      this.at = this.at.map((value, axis) => Math.min(most[axis], Math.max(0, value + step[axis] * far)));
      this.showBrush();
      if (this.stroke) this.go(); else this.tell();
    } else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this.undo();
    }
  }

  showBrush() {
    const { width, height } = this.mask;
    Object.assign(this.brush.style, {
      left: `${this.at[0] / width * 100}%`, top: `${this.at[1] / height * 100}%`, width: `${this.diameter / width * 100}%`,
    });
    this.brush.hidden = false;
  }

  tell() {
    const [x, y] = this.at.map((value, axis) => Math.round(value / [this.mask.width, this.mask.height][axis] * 100));
    this.say(`Brush ${x} % from the left, ${y} % from the top; ${Math.round(100 * this.painted())} % painted.`);
  }

  // ---- the mask --------------------------------------------------------------------------------------------------

  // The share of the picture that is painted.
  painted() {
    const small = document.createElement("canvas");
    small.width = small.height = 64;
    const context = small.getContext("2d");
    context.drawImage(this.mask, 0, 0, 64, 64);
    const { data } = context.getImageData(0, 0, 64, 64);
    let sum = 0;
    for (let i = 3; i < data.length; i += 4) sum += data[i];
    return sum / 255 / 64 / 64;
  }

  // White where it is painted, in the picture's own size, as a PNG.
  async png() {
    const out = document.createElement("canvas");
    [out.width, out.height] = this.size;
    const context = out.getContext("2d");
    context.drawImage(this.mask, 0, 0, out.width, out.height);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "white";
    context.fillRect(0, 0, out.width, out.height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "black";
    context.fillRect(0, 0, out.width, out.height);
    return new Promise((done) => out.toBlob(done, "image/png"));
  }
}
