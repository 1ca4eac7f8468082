// The link's secret stands behind `#`, which browsers keep to themselves: it goes into the body of one request alone.
"use strict";

const form = document.getElementById("setup");
const wrong = document.getElementById("setup-wrong");
const secret = location.hash.slice(1);

if (secret) {
  document.getElementById("no-link").hidden = true;
  form.hidden = false;
  form.elements.user_id.focus();
}

form.addEventListener("submit", async (sent) => {
  sent.preventDefault();
  const button = form.querySelector("button");
  const fields = Object.fromEntries(new FormData(form));
  button.disabled = true;
  try {
    const answer = await fetch("/setup", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token: secret, ...fields }),
    });
    if (answer.ok) {
      history.replaceState(null, "", "/setup");
      location.assign(`/sign-in?done=ready&login=${encodeURIComponent(fields.user_id)}`);
      return;
    }
    const error = await answer.json();
    wrong.textContent = `${error.detail[0].toUpperCase()}${error.detail.slice(1)}. ${error.hint}`;
  } catch {
    wrong.textContent = form.dataset.away;
  }
  wrong.hidden = false;
  button.disabled = false;
});
