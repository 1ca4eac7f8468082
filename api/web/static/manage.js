// What changes by itself is asked for again while somebody looks: `data-every` says after how many seconds.
"use strict";

document.querySelector(".sub [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });

let beat = 0;
const ask = (part) => htmx.trigger(part, "tick");
const parts = () => [...document.querySelectorAll("[data-every]")];

setInterval(() => {
  if (document.hidden) return;
  beat += 1;
  for (const part of parts()) if (beat % Number(part.dataset.every) === 0) ask(part);
}, 1000);

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) parts().forEach(ask);
});
