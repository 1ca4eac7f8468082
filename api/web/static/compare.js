// Two pictures over each other; a range says how much of the left one is to be seen.
"use strict";

const pair = document.querySelector("[data-pair]");
if (pair) {
  const [under, over] = [...pair.querySelectorAll("figure")].reverse();
  const range = pair.querySelector("input"), divide = pair.querySelector(".divide");
  const slide = () => {
    over.style.clipPath = `inset(0 ${100 - range.value}% 0 0)`;
    divide.style.left = `${range.value}%`;
  };
  pair.classList.add("sliding");
  for (const link of [under, over].map((figure) => figure.querySelector("a"))) link.tabIndex = -1; // the range is above
  range.hidden = divide.hidden = false;
  range.addEventListener("input", slide);
  slide();
}
