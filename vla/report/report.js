"use strict";
// Films play while they can be seen, unless the reader asked for less motion. Without this script everything is still there.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !target.dataset.stopped) target.play().catch(() => {});
    else if (!isIntersecting) target.pause();
  }
}, { threshold: 0.4 });

for (const card of document.querySelectorAll(".film")) {
  const video = card.querySelector("video"), strips = card.querySelector(".strips"), out = card.querySelector("output");
  if (!still) watcher.observe(video);
  video.controls = false; video.tabIndex = 0;  // they cover the picture; wanted only by who points at it
  for (const event of ["pointerenter", "focus"]) video.addEventListener(event, () => { video.controls = true; });
  for (const event of ["pointerleave", "blur"]) video.addEventListener(event, () => { video.controls = false; });
  video.addEventListener("click", () => { if (video.paused) video.dataset.stopped = 1; else delete video.dataset.stopped; });
  video.addEventListener("loadedmetadata", () => { if (video.duration < 3) video.playbackRate = 0.5; });
  const cells = JSON.parse(strips.dataset.cells), steps = +strips.dataset.steps, said = out.textContent;
  const move = () => {
    strips.style.setProperty("--at", Math.min(1, video.currentTime * video.dataset.hz / steps));
    if (!video.paused) requestAnimationFrame(move);
  };
  for (const event of ["play", "seeked"]) video.addEventListener(event, move);
  const step = (event) => {
    const box = strips.querySelector(".cells").getBoundingClientRect();
    return Math.max(0, Math.min(steps - 1, Math.floor((event.clientX - box.left) / box.width * steps)));
  };
  strips.addEventListener("pointermove", (event) => {
    const t = step(event);
    out.textContent = `step ${t}: ` + cells.names.map((name, d) =>
      `${name} ${cells.s ? "#" + cells.s[t][d] + " = " : ""}${cells.a[t][d]} (${Math.round(100 * cells.c[t][d])} %)`).join(", ");
  });
  strips.addEventListener("pointerleave", () => { out.textContent = said; });
  strips.addEventListener("click", (event) => { video.pause(); video.dataset.stopped = 1; video.currentTime = step(event) / video.dataset.hz; });
}

for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart), cross = svg.querySelector(".cross");
  const out = svg.parentElement.querySelector("output");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * chart.w;
    const x = chart.x0 + (at - chart.l) / (chart.w - chart.l - chart.r) * (chart.x1 - chart.x0);
    const near = chart.s.map((s) => s.x.reduce((best, v, i) => Math.abs(v - x) < Math.abs(s.x[best] - x) ? i : best, 0));
    out.textContent = `step ${Math.round(chart.s[0].x[near[0]])}: ` + chart.s.map((s, k) => s.y[near[k]] + chart.u).join(" · ");
    cross.setAttribute("x1", at); cross.setAttribute("x2", at); cross.style.visibility = "visible";
  });
  svg.addEventListener("pointerleave", () => { out.textContent = ""; cross.style.visibility = "hidden"; });
}
