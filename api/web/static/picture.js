// A picture's page: arrow keys, copying, and a deletion that can be undone for a while.
"use strict";

const UNDO_MS = 7000, COPIED_MS = 2000;

// ← and → go to its neighbours, unless they move something else.
document.addEventListener("keydown", (pressed) => {
  const moves = { ArrowLeft: "a[rel=prev]", ArrowRight: "a[rel=next]" }[pressed.key];
  const busy = pressed.altKey || pressed.ctrlKey || pressed.metaKey || pressed.shiftKey;
  if (moves && !busy && !pressed.target.closest("input, textarea, select, pre")) document.querySelector(moves)?.click();
});

// Where the browser does not let us copy, it is selected for Ctrl+C.
on("click", "[data-copy]", async (button) => {
  const text = button.closest("section").querySelector("pre");
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    getSelection().selectAllChildren(text);
    return;
  }
  const says = button.textContent;
  button.textContent = button.dataset.copied;
  setTimeout(() => (button.textContent = says), COPIED_MS);
});

// Deleted, and still to be undone; whoever leaves the page meanwhile meant it.
let going = null;
const main = document.getElementById("main"), notice = document.getElementById("notice");

const erase = () => {
  const { id, timer } = going;
  clearTimeout(timer);
  going = null;
  const headers = JSON.parse(document.body.getAttribute("hx-headers:inherited") ?? "{}");
  return fetch(`/images/${id}`, { method: "DELETE", keepalive: true, headers });
};

const leave = async (id, url) => {
  const answer = await erase().catch(() => null);
  // What went wrong is told where it is done without a script.
  location.href = answer?.ok || answer?.status === 404 ? url : `/picture/${id}/delete`;
};

on("click", "[data-remove]", (button, clicked) => {
  clicked.preventDefault();
  const { remove: id, then } = button.dataset;
  going = { id, button, timer: setTimeout(() => leave(id, then), UNDO_MS) };
  main.classList.add("gone");
  main.inert = true;
  notice.replaceChildren(document.getElementById("removed").content.cloneNode(true));
  notice.querySelector("[data-undo]").focus();
});

on("click", "[data-undo]", () => {
  const { button, timer } = going;
  clearTimeout(timer);
  going = null;
  main.classList.remove("gone");
  main.inert = false;
  notice.replaceChildren();
  button.focus();
});

on("click", "a[href]", (link, clicked) => {
  if (!going || clicked.ctrlKey || clicked.metaKey || clicked.shiftKey) return;
  clicked.preventDefault();
  leave(going.id, link.href);
});
addEventListener("pagehide", () => going && erase());
addEventListener("pageshow", (shown) => shown.persisted && location.reload());
