// What is chosen to vary brings values to begin with, unless somebody has written their own.
"use strict";

const suggested = (select) => select.selectedOptions[0].dataset.values;
for (const select of document.querySelectorAll("[data-axis]")) select.dataset.brought = suggested(select);

document.addEventListener(
  "change",
  (changed) => {
    const select = changed.target.closest("[data-axis]");
    if (!select) return;
    const values = document.getElementById(select.dataset.axis);
    values.disabled = select.value === "";
    if (values.value.trim() === "" || values.value === select.dataset.brought) values.value = suggested(select);
    select.dataset.brought = suggested(select);
  },
  true, // before the estimate is asked for
);
