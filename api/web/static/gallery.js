// The gallery's keys, selection and undo. Without it, links, checkboxes and buttons do the same by themselves.
"use strict";

{
  const UNDO_SECONDS = 7;
  const WIDE = matchMedia("(min-width: 1100px)");
  const form = () => document.getElementById("picked");
  const details = () => document.getElementById("details");
  const tiles = () => [...document.querySelectorAll(".sheet .tile:not([hidden])")];
  const tileOf = (element) => element?.closest?.(".sheet .tile");
  const link = (tile) => tile.querySelector("a");
  const box = (tile) => tile.querySelector("[name=ids]");
  const id = (tile) => box(tile).value;
  const picked = () => tiles().filter((tile) => box(tile).checked);

  // Of all tiles one is in the tab order; arrows lead to the others.
  let current = null;
  const rove = (tile) => {
    if (current) link(current).tabIndex = -1;
    current?.classList.remove("current");
    current = tile;
    if (tile) link(tile).tabIndex = 0;
    tile?.classList.add("current");
  };
  const settle = () => {
    for (const tile of document.querySelectorAll(".sheet .tile a:not([tabindex])")) {
      tile.tabIndex = -1;
      box(tile.parentElement).tabIndex = -1;
    }
    if (!current?.isConnected || current.hidden) {
      const shown = document.querySelector("[data-shown]")?.dataset.shown;
      rove(document.getElementById(`p-${shown}`) ?? tiles()[0] ?? null);
    }
    if (gone) gone.some = gone.some.map((tile) => document.getElementById(tile.id) ?? tile); // filters brought it again
    for (const tile of gone?.some ?? []) tile.hidden = true;
    if (holes) refill();
    count();
  };

  // Every sheet holds whole rows, also when pictures between them go, or come back.
  let holes = false;
  const refill = () => {
    const size = Number(form()?.dataset.size);
    const sheets = [...document.querySelectorAll(".sheet")];
    const number = new Map(sheets.map((sheet, place) => [sheet, place]));
    let seen = 0;
    const moves = [...document.querySelectorAll(".sheet .tile")].map((tile) => {
      const to = Math.min(Math.floor((tile.hidden ? seen : seen++) / size), sheets.length - 1);
      return { tile, to, by: to - number.get(tile.parentElement) };
    });
    for (const { tile, to, by } of moves) if (by < 0) sheets[to].append(tile);
    for (const { tile, to, by } of moves.reverse()) if (by > 0) sheets[to].prepend(tile);
    for (const sheet of sheets) sheet.hidden = !sheet.querySelector(".tile:not([hidden])");
  };

  // What is selected.
  let anchor = null;
  const pick = (tile, on) => {
    box(tile).checked = on;
    tile.classList.toggle("picked", on);
  };
  const count = () => {
    if (!form()) return;
    const chosen = picked();
    for (const tile of chosen.splice(Number(form().dataset.most))) pick(tile, false);
    form().toggleAttribute("data-picked", chosen.length > 0);
    form().querySelector("[data-count]").value = chosen.length;
  };
  const pickAll = (some, on = true) => {
    for (const tile of some) pick(tile, on);
    count();
  };
  const range = (tile) => {
    const all = tiles();
    const began = all.includes(anchor) ? anchor : tile;
    const [from, to] = [all.indexOf(began), all.indexOf(tile)].sort((a, b) => a - b);
    pickAll(all.slice(from, to + 1));
  };
  const selecting = (on) => {
    form()?.classList.toggle("selecting", on);
    document.querySelector("[data-select]")?.setAttribute("aria-pressed", String(on));
    if (!on) pickAll(picked(), false);
  };

  // What stands beside the grid.
  let soon = 0;
  const show = (tile, again = false) => {
    clearTimeout(soon);
    if (!tile || !WIDE.matches) return;
    if (!again && document.querySelector("[data-shown]")?.dataset.shown === id(tile)) return;
    htmx.ajax("GET", `/page/gallery/${id(tile)}`, { source: details(), target: details(), swap: "innerHTML" });
  };

  // Says something to the server; whether it heard is told by the answer.
  const say = (html) => {
    const notice = document.getElementById("notice");
    notice.replaceChildren(...(typeof html === "string" ? new DOMParser().parseFromString(html, "text/html").body.childNodes : [html]));
  };
  const body = (values) => {
    const token = form()?.elements.csrf_token.value ?? "";
    return new URLSearchParams([["csrf_token", token], ...values]);
  };
  const send = async (path, values) => {
    const headers = { "HX-Request": "true", "HX-Current-URL": location.href };
    let answer;
    try {
      answer = await fetch(path, { method: "POST", body: body(values), headers, keepalive: true });
    } catch {
      say(document.getElementById("lost").content.cloneNode(true));
      return false;
    }
    if (answer.headers.get("HX-Redirect")) location.assign(answer.headers.get("HX-Redirect"));
    else if (!answer.ok) say(await answer.text());
    return answer.ok;
  };
  const act = async (path, ids, name, value) => {
    if (!ids.length || !(await send(path, [...ids.map((one) => ["ids", one]), [name, value]]))) return;
    const meant = tiles().filter((tile) => ids.includes(id(tile)));
    if (name === "rating") for (const tile of meant) tile.dataset.rating = value;
    else await reboard();
    const here = document.querySelector("#filters [name=tag]:checked")?.value;
    if (path.endsWith("/unboard") && value === here) {
      holes = true;
      for (const tile of meant) tile.remove();
      settle();
    }
    const shown = document.querySelector("[data-shown]")?.dataset.shown;
    if (ids.includes(shown)) show(document.getElementById(`p-${shown}`) ?? current, true);
  };
  const reboard = () =>
    htmx.ajax("GET", `/page/gallery/boards${location.search}`, { source: "#boards", target: "#boards", swap: "outerHTML" });

  // Deleting: gone from the page at once, from the server once nobody has undone it.
  let gone = null;
  const remove = (some) => {
    if (!some.length) return;
    finish();
    holes = true;
    const all = tiles();
    const next = all.slice(all.indexOf(some.at(-1)) + 1).find((tile) => !some.includes(tile)) ?? all.filter((tile) => !some.includes(tile)).at(-1);
    for (const tile of some) {
      pick(tile, false);
      tile.hidden = true;
    }
    rove(next ?? null);
    settle();
    if (next) link(next).focus();
    gone = { some, timer: setTimeout(finish, UNDO_SECONDS * 1000) };
    const words = document.getElementById("undo");
    const notice = words.content.cloneNode(true);
    notice.querySelector("p").textContent = some.length === 1 ? words.dataset.one : words.dataset.many.replace("{n}", some.length);
    say(notice);
  };
  const ending = () => {
    const { some, timer } = gone;
    clearTimeout(timer);
    gone = null;
    document.querySelector("#notice [data-undo]")?.closest(".notice").remove();
    return some;
  };
  const undo = () => {
    if (!gone) return;
    const some = ending();
    for (const tile of some) tile.hidden = false;
    settle();
    link(some[0]).focus();
  };
  const erasing = (some) => [["sure", "true"], ...some.map((tile) => ["ids", id(tile)])];
  const finish = async () => {
    if (!gone) return;
    const some = ending();
    if (await send("/page/gallery/delete", erasing(some))) {
      for (const tile of some) tile.remove();
      if (!tiles().length && !document.querySelector(".older")) location.reload();
    } else {
      for (const tile of some) tile.hidden = false;
    }
    settle();
  };
  addEventListener("pagehide", () => {
    if (!gone) return;
    const some = ending();
    navigator.sendBeacon("/page/gallery/delete", body(erasing(some)));
    sessionStorage.setItem("gone", some.map(id).join(" ")); // the next page may be made before it arrives
  });

  // Who comes back from a picture is where they were.
  const remember = (tile) => {
    const here = new URL(location.href);
    here.searchParams.set("until", id(tile));
    history.replaceState({ htmx: true }, "", here);
  };

  on("click", ".sheet .tile a", (a, clicked) => {
    const tile = tileOf(a);
    if (clicked.ctrlKey || clicked.metaKey) return;
    if (clicked.shiftKey) {
      clicked.preventDefault();
      range(tile);
    } else if (form().classList.contains("selecting")) {
      clicked.preventDefault();
      pick(tile, !box(tile).checked);
      count();
    } else if (WIDE.matches && clicked.detail === 1) {
      clicked.preventDefault(); // its details come; the second click of two opens it, as Enter does
      a.focus();
      show(tile);
    } else remember(tile);
    anchor = tile;
  });
  on("click", "#details a[href^='/picture/']", () => remember(current));
  on("click", ".sheet [name=ids]", (clicked, { shiftKey }) => {
    const tile = tileOf(clicked);
    if (shiftKey && clicked.checked) range(tile);
    pickAll([tile], clicked.checked);
    anchor = tile;
  });
  on("focusin", ".sheet .tile", (tile) => {
    rove(tile);
    clearTimeout(soon);
    soon = setTimeout(show, 120, tile);
  });
  on("click", "[data-none]", () => selecting(false));
  on("click", "[data-select]", (button) => selecting(button.getAttribute("aria-pressed") !== "true"));
  on("click", "[data-undo]", undo);
  on("submit", "#picked, [data-act]", (sent, submitted) => {
    const button = submitted.submitter;
    if (button?.hasAttribute("data-plain")) return;
    submitted.preventDefault();
    if (button?.hasAttribute("data-delete")) return remove(picked());
    const name = button?.name || "board";
    const value = button?.name ? button.value : sent.querySelector("input[name=board]").value;
    const ids = sent === form() ? picked().map(id) : [sent.elements.ids.value];
    const action = button?.hasAttribute("formaction") ? button.formAction : sent.action; // else it is the page's own
    act(new URL(action).pathname, ids, name, value);
    if (!button?.name) sent.querySelector("input[name=board]").value = "";
  });

  const STEPS = { ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: (columns) => -columns, ArrowDown: (columns) => columns };
  const move = (pressed) => {
    const all = tiles();
    const columns = Number(getComputedStyle(document.querySelector(".sheet")).getPropertyValue("--columns"));
    const at = all.indexOf(tileOf(document.activeElement));
    const to = at < 0 ? all.indexOf(current) : at + STEPS[pressed.key](columns);
    const tile = all[to];
    if (!tile) return;
    pressed.preventDefault();
    anchor ??= current;
    link(tile).focus();
    tile.scrollIntoView({ block: "nearest" });
    if (pressed.shiftKey) range(tile);
    else anchor = tile;
  };
  addEventListener("keydown", (pressed) => {
    const at = pressed.target;
    if (at.matches("input:not([type=checkbox], [type=radio]), textarea, select") || pressed.altKey) return;
    const tile = tileOf(at);
    if (pressed.ctrlKey || pressed.metaKey) {
      if (pressed.key === "a" && form()) {
        pressed.preventDefault();
        pickAll(tiles().slice(0, Number(form().dataset.most)));
      } else if (pressed.key === "z") undo();
    } else if (pressed.key === "/") {
      pressed.preventDefault();
      document.getElementById("words")?.focus();
    } else if (pressed.key === "?") document.getElementById("keys")?.togglePopover();
    else if (pressed.key === "Escape") selecting(false);
    else if (!form() || (!tile && at !== document.body)) return;
    else if (pressed.key in STEPS) move(pressed);
    else if (pressed.key === " " && tile && at !== box(tile)) {
      pressed.preventDefault();
      pick(tile, !box(tile).checked);
      anchor = tile;
      count();
    } else if (/^[0-5]$/.test(pressed.key) || pressed.key === "Delete") {
      const some = picked().length ? picked() : tile ? [tile] : [];
      if (pressed.key === "Delete") remove(some);
      else act("/page/gallery/rate", some.map(id), "rating", pressed.key);
    }
  });

  document.addEventListener("htmx:after:swap", ({ detail }) => {
    if (detail.ctx?.target !== details()) settle();
  });
  history.replaceState({ htmx: true }, ""); // going back to where filters began reloads, too
  for (const one of (sessionStorage.getItem("gone") ?? "").split(" ").filter(Boolean)) document.getElementById(`p-${one}`)?.remove();
  sessionStorage.removeItem("gone");
  settle();
  const until = document.getElementById(`p-${new URL(location.href).searchParams.get("until")}`);
  if (until) {
    link(until).focus({ preventScroll: true });
    until.scrollIntoView({ block: "center" });
  }
}
