"use strict";
// Episodes play under the pointer or the focus. Without this script their first pictures are still there.
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const cards = [...document.querySelectorAll(".ep")];
for (const card of cards) {
  const strips = [...card.querySelectorAll(".strip")], bar = card.querySelector(".at");
  const count = Math.max(...strips.map((s) => +s.dataset.n));
  let at = 0, timer = 0;
  const show = (k) => {
    at = (k + count) % count;
    for (const s of strips) {
      const n = +s.dataset.n;
      s.style.backgroundPositionX = n > 1 ? `${100 * Math.min(at, n - 1) / (n - 1)}%` : "0";
    }
    bar.style.width = count > 1 ? `${100 * at / (count - 1)}%` : "0";
  };
  const stop = () => { clearInterval(timer); timer = 0; };
  const play = () => { stop(); timer = setInterval(() => show(at + 1), 180); };
  for (const event of ["pointerenter", "focus"]) card.addEventListener(event, () => { if (!calm && !timer) play(); });
  card.addEventListener("pointerleave", () => { if (document.activeElement !== card) { stop(); show(0); } });
  card.addEventListener("blur", () => { stop(); show(0); });
  card.addEventListener("click", () => { if (timer) stop(); else play(); });
  card.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); if (timer) stop(); else play(); }
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") { event.preventDefault(); stop(); show(at + (event.key === "ArrowRight" ? 1 : -1)); }
  });
}
const find = document.querySelector("#find"), order = document.querySelector("#order"), shown = document.querySelector("#shown");
if (find) {
  const all = document.querySelector("#all"), few = 28;
  let whole = cards.length <= few + 7;
  const apply = () => {
    const wanted = find.value.trim().toLowerCase();
    let left = 0;
    for (const card of cards) {
      card.hidden = wanted !== "" && card.dataset.e !== wanted && !card.querySelector(".caption").textContent.toLowerCase().includes(wanted);
      left += !card.hidden;
    }
    shown.textContent = `${left} of ${cards.length}`;
    const key = order.value.replace("-", ""), sign = order.value === "n" || order.value[0] === "-" ? 1 : -1;
    const value = (card) => +card.dataset[key === "n" ? "e" : key];
    const grid = document.querySelector(".eps");
    let room = whole || wanted ? Infinity : few;
    for (const card of [...cards].sort((a, b) => sign * (value(a) - value(b)))) {
      grid.append(card);
      if (!card.hidden && room-- <= 0) card.hidden = true;
    }
    all.hidden = whole || wanted !== "";
  };
  const unfold = () => { whole = true; apply(); };
  const jump = () => {
    const target = location.hash.startsWith("#ep-") && document.querySelector(location.hash);
    if (target) { find.value = ""; if (target.hidden) unfold(); target.scrollIntoView(); target.focus({ preventScroll: true }); }
  };
  all.addEventListener("click", unfold);
  addEventListener("hashchange", jump);
  find.addEventListener("input", apply);
  order.addEventListener("change", apply);
  apply();
  jump();
}
