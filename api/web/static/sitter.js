// What HTML cannot do by itself. Everything works without it but what needs a script by nature.
"use strict";

const on = (event, selector, act) =>
  document.addEventListener(event, (happened) => {
    const found = happened.target.closest?.(selector);
    if (found) act(found, happened);
  });

// A range says its number.
on("input", ".field input[type=range]", (range) => {
  range.closest(".field").querySelector(".value").textContent = range.value;
});

// The token under the prompt is that of whoever is chosen.
on("change", "input[name=who]", (chosen) => {
  for (const says of document.querySelectorAll(".says")) says.hidden = says.dataset.of !== chosen.value;
});

on("click", "[data-close]", (button) => button.closest(".notice").remove());

on("click", "[data-try]", (button) => {
  const prompt = document.getElementById("prompt");
  prompt.value = button.dataset.try;
  prompt.focus();
});

// The lock keeps the last picture's seed, or lets it go.
on("click", "[data-lock]", (button) => {
  const seed = document.getElementById("seed");
  const last = document.querySelector(".live[data-seed]:not([data-seed=''])");
  seed.value = seed.value ? "" : last?.dataset.seed ?? String(Math.floor(Math.random() * 2 ** 32));
  button.setAttribute("aria-pressed", String(seed.value !== ""));
});
on("input", "#seed", (seed) => {
  document.querySelector("[data-lock]").setAttribute("aria-pressed", String(seed.value !== ""));
});

document.addEventListener("keydown", (pressed) => {
  const form = document.querySelector("#compose, #plan");
  if (form && pressed.key === "Enter" && (pressed.ctrlKey || pressed.metaKey) && !pressed.repeat) form.requestSubmit();
});

// Where there is room for all of the page, what one types goes into the prompt at once.
if (matchMedia("(min-width: 861px)").matches) document.querySelector("[data-first]")?.focus();

// What is typed outlives a reload, and signing in again.
const restoreDraft = () => {
  const draft = document.querySelector("[data-draft] textarea");
  if (draft?.value) sessionStorage.setItem("draft", draft.value);
  else if (draft) draft.value = sessionStorage.getItem("draft") ?? "";
};
on("input", "[data-draft] textarea", (draft) => sessionStorage.setItem("draft", draft.value));
restoreDraft();

// What one asked for comes into view: on a phone it stands above the form.
const newest = () => document.querySelector("#jobs > .live");
let asked = null;
on("submit", "#compose", () => (asked = { after: newest()?.id }));
const lookAtIt = () => {
  if (!asked || !newest() || newest().id === asked.after) return;
  asked = null;
  newest().querySelector(".canvas").scrollIntoView({ block: "nearest" });
};

// Who stood on a button that went with what it was for goes on from what came in its place.
let around = "";
for (const event of ["focusin", "pointerdown"])
  document.addEventListener(event, ({ target }) => (around = target.closest(".live, #facts")?.id ?? ""));
const goOn = () => {
  const place = around && document.activeElement === document.body && document.getElementById(around);
  if (place) (place.querySelector(".line a, .line button:enabled") ?? place).focus({ preventScroll: true });
};

// The last that was seen of a picture stays behind it until it is there.
let previews = [];
const keepPreviews = () => {
  for (const { id, src } of previews) {
    const drawn = document.querySelector(`#${id} .canvas a img`);
    if (drawn) drawn.style.backgroundImage = `url(${src})`;
  }
  previews = [...document.querySelectorAll("#jobs .sharpening")].map(({ src, parentElement }) => ({ id: parentElement.parentElement.id, src }));
};

// The time where the reader is.
const localTimes = () => {
  const format = { dateStyle: "medium", timeStyle: "short" };
  for (const time of document.querySelectorAll("time[data-local]"))
    time.textContent = new Date(time.dateTime).toLocaleString(document.documentElement.lang, format);
};
localTimes();

// Once something is drawn, what stood in its place goes.
document.addEventListener("htmx:after:swap", () => {
  restoreDraft();
  lookAtIt();
  goOn();
  keepPreviews();
  localTimes();
  if (document.querySelector("#jobs > .live")) {
    document.querySelector(".stage > .empty")?.remove();
    const lately = document.getElementById("lately");
    if (lately?.childElementCount) lately.closest("section").hidden = false;
  }
});

// A session that ended while a stream was open.
document.addEventListener("htmx:sse:error", (happened) => {
  if (happened.detail.status === 401) location.reload();
});

// htmx comes back to a stream that broke; to one that never began, we do.
const STREAM_RETRY_MS = 3000;
const beginAgain = ({ target, detail: { ctx } }) => {
  const url = target.getAttribute?.("hx-sse:connect"), status = ctx?.response?.status ?? 503;
  if (!url) return;
  if (status === 401) location.reload();
  else if (status === 429 || status >= 500)
    setTimeout(() => target.isConnected && htmx.ajax("GET", url, { source: target }), STREAM_RETRY_MS);
};
document.addEventListener("htmx:error", beginAgain);
document.addEventListener("htmx:response:error", beginAgain);

// A PNG that is dropped anywhere says how it was made. What is dragged from the page itself is left alone,
// and so is what a part of the page takes for itself (`data-drops`).
let dragsOurs = false;
const drops = (event) =>
  document.getElementById("dropped") && event.dataTransfer?.types.includes("Files") && !dragsOurs &&
  !event.defaultPrevented && !event.target.closest?.("[data-drops], input[type=file]");
const showDrop = (shown) => document.body.classList.toggle("dropping", shown);
document.addEventListener("dragstart", () => (dragsOurs = true));
document.addEventListener("dragend", () => (dragsOurs = false));
document.addEventListener("dragover", (over) => {
  const ours = Boolean(drops(over));
  showDrop(ours);
  if (ours) over.preventDefault();
});
document.addEventListener("dragleave", (left) => left.relatedTarget ?? showDrop(false));
document.addEventListener("drop", (dropped) => {
  showDrop(false);
  if (!drops(dropped)) return;
  dropped.preventDefault();
  readPicture(dropped.dataTransfer.files);
});
on("change", "input[form=dropped]", (input) => input.form.requestSubmit());

function readPicture(files) {
  const form = document.getElementById("dropped");
  let input = form.elements.picture;
  if (!input) {
    input = Object.assign(document.createElement("input"), { type: "file", name: "picture", hidden: true });
    form.append(input);
  }
  input.files = files;
  form.requestSubmit();
}
// A menu closes when one looks elsewhere.
document.addEventListener("click", (clicked) => {
  for (const menu of document.querySelectorAll(".menu[open]")) if (!menu.contains(clicked.target)) menu.open = false;
});
document.addEventListener("keydown", (pressed) => {
  const menu = pressed.key === "Escape" && document.querySelector(".menu[open]");
  if (menu) { menu.open = false; menu.querySelector("summary").focus(); }
});
