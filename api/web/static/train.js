// The pictures of a training: dropped or chosen, shown at once, looked at one after the other, taken away again.
"use strict";

const input = document.getElementById("pictures");
const chosen = document.getElementById("chosen");
const MOST_FILES = 100;
let pictures = []; // {file, item, mark}: the mark tells a good one from others
let looking = Promise.resolve();

const same = (one, other) =>
  one.name === other.name && one.size === other.size && one.lastModified === other.lastModified;

function add(files) {
  for (const file of files) {
    if (pictures.length >= MOST_FILES || pictures.some((one) => same(one.file, file))) continue;
    const item = document.getElementById("picture").content.firstElementChild.cloneNode(true);
    const picture = { file, item, mark: "" };
    const image = item.querySelector("img");
    image.src = URL.createObjectURL(file);
    image.addEventListener("error", () => (image.hidden = true));
    item.querySelector(".name").textContent = file.name;
    const away = item.querySelector(".away");
    away.setAttribute("aria-label", `${away.getAttribute("aria-label")}: ${file.name}`);
    away.addEventListener("click", () => remove(picture));
    chosen.append(item);
    pictures.push(picture);
    ask(picture);
  }
  settle();
}

function remove(picture) {
  const next = picture.item.nextElementSibling ?? picture.item.previousElementSibling;
  URL.revokeObjectURL(picture.item.querySelector("img").src);
  picture.item.remove();
  pictures = pictures.filter((one) => one !== picture);
  (next?.querySelector(".away") ?? input).focus();
  settle();
  for (const one of pictures) if (!one.mark) ask(one); // it may have been refused for being like this one
}

// What is sent is what is shown.
function settle() {
  const files = new DataTransfer();
  for (const { file } of pictures) files.items.add(file);
  input.files = files.files;
  count();
}

function count() {
  const says = document.getElementById("count");
  const good = pictures.filter((one) => one.mark).length;
  const text = says.dataset.says.replace("{good}", good).replace("{all}", pictures.length);
  const few = good < 3 ? ` ${says.dataset.few.replace("{left}", 3 - good)}` : "";
  says.textContent = pictures.length ? text + few : "";
}

function ask(picture) {
  looking = looking.then(() => look(picture));
}

async function look(picture) {
  if (!pictures.includes(picture) || picture.mark) return;
  const verdict = picture.item.querySelector(".verdict");
  const form = new FormData();
  form.append("csrf_token", document.querySelector("#train [name=csrf_token]").value);
  form.append("marks", pictures.map((one) => one.mark).join(" "));
  form.append("pictures", picture.file);
  try {
    const answer = await fetch("/page/people/look", { method: "POST", body: form });
    if (!answer.ok || answer.redirected) throw new Error(answer.statusText);
    verdict.innerHTML = await answer.text();
  } catch {
    verdict.replaceChildren(document.getElementById("unseen").content.cloneNode(true));
  }
  picture.mark = verdict.querySelector("[data-mark]")?.dataset.mark ?? "";
  count();
}

input.addEventListener("change", () => add([...input.files]));

// Dropped anywhere on this page it is a picture of them.
const drop = document.querySelector(".drop");
for (const event of ["dragenter", "dragover"])
  document.addEventListener(event, (happened) => {
    if (!happened.dataTransfer?.types.includes("Files")) return;
    happened.preventDefault();
    happened.stopImmediatePropagation();
    drop.classList.add("over");
  }, true);
document.addEventListener("dragleave", (happened) => {
  if (!happened.relatedTarget) drop.classList.remove("over");
}, true);
document.addEventListener("drop", (happened) => {
  if (!happened.dataTransfer?.files.length) return;
  happened.preventDefault();
  happened.stopImmediatePropagation();
  drop.classList.remove("over");
  add([...happened.dataTransfer.files]);
}, true);

// The words for them, as they stand in a prompt.
const form = document.getElementById("train");
form.addEventListener("input", (happened) => {
  if (happened.target.name === "other_noun") form.querySelector(".other input").checked = true;
  const noun = form.querySelector("[name=class_noun]:checked").value || form.elements.other_noun.value;
  document.getElementById("words").textContent = `sks ${noun || "…"}`;
});

if (input.files.length) add([...input.files]); // the browser kept them over a reload

// A page that comes back by the Back button has sent its key already.
addEventListener("pageshow", (shown) => shown.persisted && location.reload());
