"use strict";
(() => {
  const data = JSON.parse(document.getElementById("uf-map-data").textContent);
  const canvas = document.querySelector(".uf-map canvas"), tip = document.querySelector(".uf-map-tip");
  const draw = canvas.getContext("2d"), search = document.querySelector(".uf-map-bar input");
  const points = data.points.slice().sort((a, b) => (a[3] < b[3] ? -1 : a[3] > b[3] ? 1 : 0));
  const lower = points.map(point => point[4].toLowerCase());
  const xs = points.map(point => point[0]), ys = points.map(point => point[1]);
  const span = list => list.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
  const [left, right] = span(xs), [bottom, top] = span(ys);
  const shown = data.domains.map(() => true), pointers = new Map();
  let scale = 1, moveX = 0, moveY = 0, width = 0, height = 0, needle = "", chosen = -1, pinch = 0;

  const whole = () => {
    scale = 0.94 * Math.min(width / (right - left || 1), height / (top - bottom || 1));
    moveX = width / 2 - scale * (left + right) / 2;
    moveY = height / 2 + scale * (bottom + top) / 2;
  };
  const at = point => [moveX + scale * point[0], moveY - scale * point[1]];
  const visible = n => shown[points[n][2]] && (!needle || lower[n].includes(needle));

  let waiting = false;
  const paint = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const dots = window.devicePixelRatio || 1;
      draw.setTransform(dots, 0, 0, dots, 0, 0);
      draw.clearRect(0, 0, width, height);
      const radius = Math.max(1.6, Math.min(6, 60 / Math.sqrt(points.length) * Math.sqrt(scale * 12)));
      for (let n = 0; n < points.length; n++) {
        if (!shown[points[n][2]]) continue;
        const [x, y] = at(points[n]);
        if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
        draw.globalAlpha = visible(n) ? 0.72 : 0.06;
        draw.fillStyle = data.colours[points[n][2]];
        draw.beginPath();
        draw.arc(x, y, radius, 0, 7);
        draw.fill();
      }
      if (chosen >= 0) {
        const [x, y] = at(points[chosen]);
        draw.globalAlpha = 1;
        draw.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
        draw.lineWidth = 1.5;
        draw.beginPath();
        draw.arc(x, y, radius + 3, 0, 7);
        draw.stroke();
      }
    });
  };
  const fit = () => {
    const box = canvas.getBoundingClientRect(), dots = window.devicePixelRatio || 1, first = !width;
    width = box.width; height = box.height;
    canvas.width = Math.round(width * dots); canvas.height = Math.round(height * dots);
    if (first) whole();
    paint();
  };
  const place = event => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const choose = (x, y) => {
    let best = 196; chosen = -1;
    for (let n = 0; n < points.length; n++) {
      if (!visible(n)) continue;
      const [px, py] = at(points[n]), far = (px - x) ** 2 + (py - y) ** 2;
      if (far < best) { best = far; chosen = n; }
    }
    tip.hidden = chosen < 0;
    if (chosen >= 0) {
      const head = document.createElement("b");
      head.textContent = data.domains[points[chosen][2]] + "  " + points[chosen][3];
      tip.replaceChildren(head, document.createTextNode(points[chosen][4]));
      const right = x > width / 2, low = y > height / 2;
      tip.style.transform = `translate(${x + (right ? -12 : 12)}px, ${y + (low ? -12 : 12)}px) ` +
        `translate(${right ? -100 : 0}%, ${low ? -100 : 0}%)`;
    }
    paint();
  };
  const zoom = (x, y, factor) => {
    moveX = x - factor * (x - moveX);
    moveY = y - factor * (y - moveY);
    scale *= factor;
    paint();
  };
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    zoom(...place(event), Math.exp(-0.0015 * event.deltaY));
  }, { passive: false });
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    pinch = 0;
    choose(...place(event));
  });
  canvas.addEventListener("pointermove", event => {
    const [x, y] = place(event);
    if (!pointers.has(event.pointerId)) return choose(x, y);
    const [oldX, oldY] = pointers.get(event.pointerId);
    pointers.set(event.pointerId, [x, y]);
    if (pointers.size === 1) {
      moveX += x - oldX; moveY += y - oldY;
      if (Math.hypot(x - oldX, y - oldY) > 2) tip.hidden = true;
    } else {
      const [one, two] = [...pointers.values()], far = Math.hypot(one[0] - two[0], one[1] - two[1]);
      if (pinch) zoom((one[0] + two[0]) / 2, (one[1] + two[1]) / 2, far / pinch);
      pinch = far;
    }
    paint();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, event => { pointers.delete(event.pointerId); pinch = 0; });
  }
  canvas.addEventListener("pointerleave", () => { if (!pointers.size) { chosen = -1; tip.hidden = true; paint(); } });
  for (const button of document.querySelectorAll(".uf-map-bar [data-domain]")) {
    button.addEventListener("click", () => {
      const number = Number(button.dataset.domain);
      shown[number] = !shown[number];
      button.setAttribute("aria-pressed", String(shown[number]));
      chosen = -1; tip.hidden = true;
      paint();
    });
  }
  document.querySelector(".uf-map-bar [data-reset]").addEventListener("click", () => { whole(); paint(); });
  search.addEventListener("input", () => {
    needle = search.value.trim().toLowerCase();
    chosen = -1; tip.hidden = true;
    paint();
  });
  new ResizeObserver(fit).observe(canvas);
  fit();
})();
