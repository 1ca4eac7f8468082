// One's account, with a script: choices that are kept as they are made, and a secret that is copied.
"use strict";

document.addEventListener("change", (changed) => changed.target.closest("[data-send-on-change]")?.requestSubmit());

const ready = (where) => {
  for (const button of where.querySelectorAll("[data-copy]")) button.hidden = false;
  for (const field of where.querySelectorAll("[data-must-be]")) agree(field);
};

const agree = (field) => {
  field.closest("form").querySelector("button").disabled = field.value.trim() !== field.dataset.mustBe;
};

document.addEventListener("input", (typed) => {
  if (typed.target.matches("[data-must-be]")) agree(typed.target);
});

document.addEventListener("click", async (clicked) => {
  const button = clicked.target.closest("[data-copy]");
  if (!button) return;
  const field = document.getElementById(button.dataset.copy);
  field.select();
  try {
    await navigator.clipboard.writeText(field.value);
  } catch {
    document.execCommand("copy"); // pages that did not come by HTTPS have no clipboard
  }
  button.textContent = button.dataset.done;
});

document.addEventListener("htmx:after:swap", () => ready(document));
ready(document);
