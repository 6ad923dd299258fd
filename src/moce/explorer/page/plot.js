// A map of points on a canvas: colors, zoom, and the point under the mouse. Made for 100,000 points without
// WebGL, which remote desktops and virtual machines lack.

const CELLS = 128; // of the grid in which points are looked up, per side
const REACH = 10; // pixels around the mouse
const MARGIN = 28;
const MANY = 10_000; // dots, from which they are squares
const FEW = ["#44aa99", "#cc6677", "#88ccee", "#ddcc77", "#332288", "#117733", "#882255", "#999933", "#aa4499"]; // Paul Tol's "muted"

export const unpack = (text, type) => new type(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);

const palette = (count) =>
  count <= FEW.length ? FEW.slice(0, count)
    : Array.from({ length: count }, (_, n) => `hsl(${Math.round(n * 137.508) % 360} ${55 + 15 * (n % 3)}% ${44 + 12 * (n % 2)}%)`);

export class Plot {
  constructor(stage, map, { hover, click }) {
    map.clusterOf = unpack(map.cluster, Int32Array);
    this.places = unpack(map.places, Float32Array);
    this.count = map.ids.length;
    this.clusterOf = map.clusterOf;
    for (const coloring of map.colorings) {
      coloring.group = unpack(coloring.of, Int32Array);
      coloring.counts = new Array(coloring.names.length).fill(0);
      for (const group of coloring.group) coloring.counts[group] += 1;
    }
    Object.assign(this, { stage, hover, click, marked: [], chosen: null, starred: [], bright: null, one: null, star_: 0, drawn: 0 });
    [this.points, this.marks] = stage.querySelectorAll("canvas");
    this.style = getComputedStyle(document.documentElement);
    this.index();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(stage);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.resize();
  }

  // --- what is shown ------------------------------------------------------------------------------

  color(coloring) {
    this.coloring = coloring;
    this.colors = palette(coloring.names.length);
    this.byGroup = coloring.names.map(() => []);
    coloring.group.forEach((group, point) => this.byGroup[group].push(point));
    this.one = null;
    this.draw();
  }

  single(group) { // one group of the coloring, or all
    this.one = group;
    this.draw();
  }

  only(cluster) { // one cluster bright, or all
    this.bright = cluster;
    this.draw();
  }

  mark(points, chosen) {
    Object.assign(this, { marked: points, chosen });
    this.drawMarks();
  }

  stars(places) {
    this.starred = places;
    this.drawMarks();
  }

  star(row) {
    this.star_ = row;
    this.drawMarks();
  }

  reset() {
    const { width, height } = this;
    const scale = Math.min(width, height) - 2 * MARGIN;
    const far = [0, 1].map((axis) => this.extent[axis] * scale);
    this.view = { scale, x: (width - far[0]) / 2, y: (height - far[1]) / 2 };
    this.whole = scale;
    this.draw();
  }

  // --- where points are ---------------------------------------------------------------------------

  index() {
    this.extent = [0, 0];
    this.cells = new Map();
    for (let point = 0; point < this.count; point += 1) {
      const [x, y] = [this.places[2 * point], this.places[2 * point + 1]];
      this.extent = [Math.max(this.extent[0], x), Math.max(this.extent[1], y)];
      const key = this.cell(x, y);
      if (this.cells.has(key)) this.cells.get(key).push(point);
      else this.cells.set(key, [point]);
    }
  }

  cell(x, y) {
    return Math.floor(x * CELLS) * 1024 + Math.floor(y * CELLS);
  }

  toScreen(x, y) {
    return [this.view.x + x * this.view.scale, this.view.y + y * this.view.scale];
  }

  screen(point) { // in pixels of the stage
    return this.toScreen(this.places[2 * point], this.places[2 * point + 1]);
  }

  at(sx, sy) { // the point nearest to a place of the stage, or null
    const { scale, x, y } = this.view;
    const [cx, cy, reach] = [(sx - x) / scale, (sy - y) / scale, REACH / scale];
    let [best, found] = [reach * reach, null];
    for (let i = Math.floor((cx - reach) * CELLS); i <= Math.floor((cx + reach) * CELLS); i += 1) {
      for (let j = Math.floor((cy - reach) * CELLS); j <= Math.floor((cy + reach) * CELLS); j += 1) {
        for (const point of this.cells.get(i * 1024 + j) ?? []) {
          const far = (this.places[2 * point] - cx) ** 2 + (this.places[2 * point + 1] - cy) ** 2;
          if (far < best && this.shown(point)) [best, found] = [far, point];
        }
      }
    }
    return found;
  }

  shown(point) {
    return this.one === null || this.coloring.group[point] === this.one;
  }

  // --- drawing ------------------------------------------------------------------------------------

  resize() {
    const box = this.stage.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    Object.assign(this, { width: box.width, height: box.height });
    for (const canvas of [this.points, this.marks]) {
      canvas.width = Math.round(box.width * ratio);
      canvas.height = Math.round(box.height * ratio);
      canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    }
    this.reset();
  }

  draw() {
    if (!this.coloring || this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      const start = performance.now();
      this.drawPoints();
      this.drawMarks();
      this.drawn = performance.now() - start;
    });
  }

  layers() { // [points, color, alpha] from the back to the front
    const dim = this.style.getPropertyValue("--dim").trim();
    const lit = (point) => this.clusterOf[point] === this.bright;
    const back = [], front = [];
    this.byGroup.forEach((points, group) => {
      if (this.one !== null && group !== this.one) back.push([points, dim, 0.35]);
      else if (this.bright === null) front.push([points, this.colors[group], 0.85]);
      else {
        back.push([points.filter((point) => !lit(point)), dim, 0.55]);
        front.push([points.filter(lit), this.colors[group], 0.85]);
      }
    });
    return [...back, ...front];
  }

  drawPoints() {
    const context = this.points.getContext("2d");
    const near = Math.min(3, Math.sqrt(this.view.scale / this.whole));
    const size = Math.max(1.6, Math.min(7, 0.27 * Math.sqrt((this.width * this.height) / this.count))) * near;
    context.clearRect(0, 0, this.width, this.height);
    if (this.count > MANY) this.drawSquares(context, size);
    else this.drawDots(context, size);
  }

  drawDots(context, size) {
    for (const [points, color, alpha] of this.layers()) {
      Object.assign(context, { fillStyle: color, globalAlpha: alpha });
      for (const point of points) {
        const [x, y] = this.screen(point);
        if (x < -8 || y < -8 || x > this.width + 8 || y > this.height + 8) continue;
        context.beginPath();
        context.arc(x, y, size / 2, 0, 2 * Math.PI);
        context.fill();
      }
    }
    context.globalAlpha = 1;
  }

  drawSquares(context, size) { // straight to pixels: many times as fast as shapes
    const { points: { width, height }, places } = this;
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const ratio = width / this.width, side = Math.max(1, Math.round(size * ratio));
    const [scale, left, top] = [this.view.scale * ratio, this.view.x * ratio - side / 2, this.view.y * ratio - side / 2];
    for (const [points, color, alpha] of this.layers()) {
      context.fillStyle = color; // comes back as #rrggbb
      const rgb = parseInt(context.fillStyle.slice(1), 16);
      const value = (Math.round(255 * alpha) << 24) | ((rgb & 255) << 16) | (rgb & 0xff00) | (rgb >> 16);
      for (const point of points) {
        const x = Math.round(left + places[2 * point] * scale);
        const y = Math.round(top + places[2 * point + 1] * scale);
        if (x < 0 || y < 0 || x + side > width || y + side > height) continue;
        for (let row = y * width + x, last = row + side * width; row < last; row += width) {
          for (let at = row; at < row + side; at += 1) pixels[at] = value;
        }
      }
    }
    context.putImageData(image, 0, 0);
  }

  drawMarks() {
    if (!this.view) return;
    const context = this.marks.getContext("2d");
    context.clearRect(0, 0, this.width, this.height);
    const ink = this.style.getPropertyValue("--ink"), paper = this.style.getPropertyValue("--card");
    const ring = (sx, sy, radius, color, width) => {
      context.beginPath();
      context.arc(sx, sy, radius, 0, 2 * Math.PI);
      Object.assign(context, { strokeStyle: color, lineWidth: width });
      context.stroke();
    };
    if (this.chosen !== null) ring(...this.screen(this.chosen), 8, ink, 2);
    if (this.over !== null && this.over !== undefined) ring(...this.screen(this.over), 6, ink, 1.5);
    this.starred.forEach(([px, py], row) => {
      const [sx, sy] = this.toScreen(px, py);
      context.beginPath();
      for (let corner = 0; corner < 10; corner += 1) {
        const [angle, radius] = [(Math.PI * (corner - 2.5)) / 5, (corner % 2 ? 4.5 : 10) * (row === this.star_ ? 1.3 : 1)];
        context.lineTo(sx + radius * Math.cos(angle), sy + radius * Math.sin(angle));
      }
      context.closePath();
      Object.assign(context, { fillStyle: row === this.star_ ? "#e0a100" : "#f2c94c", strokeStyle: row === this.star_ ? ink : paper, lineWidth: 1.5 });
      context.fill();
      context.stroke();
    });
  }

  // --- mouse --------------------------------------------------------------------------------------

  listen() {
    const canvas = this.marks;
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    let from = null, moved = false;
    canvas.onpointerdown = (event) => {
      from = place(event);
      moved = false;
      canvas.setPointerCapture(event.pointerId);
    };
    canvas.onpointermove = (event) => {
      const [sx, sy] = place(event);
      if (from) {
        const [dx, dy] = [sx - from[0], sy - from[1]];
        if (moved || Math.hypot(dx, dy) > 4) {
          moved = true;
          canvas.classList.add("moving");
          this.view.x += dx;
          this.view.y += dy;
          from = [sx, sy];
          this.over = null;
          this.hover(null);
          this.draw();
        }
        return;
      }
      const point = this.at(sx, sy);
      canvas.classList.toggle("over", point !== null);
      if (point !== this.over) {
        this.over = point;
        this.drawMarks();
      }
      this.hover(point, sx, sy);
    };
    canvas.onpointerup = (event) => {
      canvas.classList.remove("moving");
      const point = from && !moved ? this.at(...place(event)) : null;
      from = null;
      if (point !== null) this.click(point);
    };
    canvas.onpointercancel = () => (from = null);
    canvas.onpointerleave = () => {
      this.over = null;
      this.hover(null);
      this.drawMarks();
    };
    canvas.onwheel = (event) => {
      event.preventDefault();
      const [sx, sy] = place(event);
      const factor = Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015));
      const scale = Math.max(this.whole / 2, Math.min(this.whole * 200, this.view.scale * factor));
      const by = scale / this.view.scale;
      this.view = { scale, x: sx - (sx - this.view.x) * by, y: sy - (sy - this.view.y) * by };
      this.draw();
    };
    canvas.ondblclick = () => this.reset();
  }
}
