"use strict";
// Everything here works on what the page already holds: nothing is loaded, nothing is sent.

const each = (root, selector, act) => root.querySelectorAll(selector).forEach(act);
const json = (root, selector) => JSON.parse(root.querySelector(selector).textContent);

// two pictures under a handle; the pictures are those of the page, found by their id
each(document, ".comparer", (root) => {
  const cases = json(root, "script"), find = (name) => root.querySelector(name);
  const which = find(".which"), left = find(".from"), right = find(".to");
  const box = find(".compare"), range = find(".compare input");
  const pick = (select, names) => {
    const before = select.value || select.dataset.first;
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.value = names.includes(before) ? before : names[0];
  };
  const put = (image, tag, name, shown) => {
    image.src = document.getElementById(shown.pictures[name]).src;
    image.alt = name + ": " + shown.label;
    tag.textContent = name;
  };
  const show = () => {
    const shown = cases[which.value], names = Object.keys(shown.pictures);
    pick(left, names);
    pick(right, names);
    put(find(".under"), find(".tag.left"), left.value, shown);
    put(find(".over"), find(".tag.right"), right.value, shown);
    find(".why").textContent = shown.note;
  };
  which.replaceChildren(...cases.map((shown, number) => new Option(shown.label, number)));
  range.addEventListener("input", () => box.style.setProperty("--at", range.value + "%"));
  [which, left, right].forEach((select) => select.addEventListener("change", show));
  show();
  root.hidden = false;
});

// previews: a prompt, a map, a step
each(document, ".explorer", (root) => {
  const steps = json(root, "script"), find = (name) => root.querySelector(name);
  const which = find(".which"), range = find(".step"), veil = find(".strength");
  let label = null; // of the map, null: the best there is
  const put = (image, url, alt) => {
    image.hidden = !url;
    if (url) image.src = url;
    image.alt = alt;
  };
  const chips = (maps) => {
    const place = find("fieldset"), names = maps.map((map) => map.label);
    place.querySelectorAll(".chip").forEach((chip) => chip.remove());
    const chosen = names.includes(label) ? label : label === "" ? "" : names[0] ?? "";
    [...names, ""].forEach((name) => {
      const chip = document.createElement("label"), radio = document.createElement("input");
      const text = document.createElement("bdi");
      chip.className = "chip";
      radio.type = "radio";
      radio.name = "map";
      radio.checked = name === chosen;
      radio.addEventListener("change", () => { label = name; show(); });
      text.textContent = name || "no map";
      chip.append(radio, text);
      place.append(chip);
    });
    return maps.find((map) => map.label === chosen);
  };
  const show = () => {
    const now = steps[range.value], first = steps[0];
    const at = Number(which.value), shown = now.cases[at];
    const base = first.step === 0 ? first.cases[at] : null;
    const focused = document.activeElement?.name === "map";
    const map = chips(shown.maps);
    if (focused) find("fieldset :checked")?.focus();
    put(find(".asked"), shown.asked, "asked, step " + now.step);
    put(find(".veil"), map?.picture, map ? map.label + " over it" : "");
    put(find(".plain"), shown.plain, "not asked, step " + now.step);
    if (base) {
      put(find(".base-asked"), base.asked, "asked, base model");
      put(find(".base-plain"), base.plain, "not asked, base model");
    }
    find(".at").textContent = now.step ? "step " + now.step : "base model";
    find(".kind").textContent = now.step && map ? map.about : "";
  };
  range.max = steps.length - 1;
  range.value = range.max;
  [which, range].forEach((control) => control.addEventListener("input", show));
  veil.addEventListener("input", () => root.style.setProperty("--veil", veil.value / 100));
  show();
  root.hidden = false;
});

// one slider reads every curve
const reader = document.querySelector("#reader");
if (reader) {
  const charts = [...document.querySelectorAll(".chart")].map((root) => ({ root, data: json(root, "script") }));
  const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(3));
  const nearest = (values, step) =>
    values.reduce((best, value) => (Math.abs(value[0] - step) < Math.abs(best[0] - step) ? value : best));
  const show = () => {
    const step = Number(reader.value);
    document.querySelector("#reader-step").textContent = "step " + step;
    charts.forEach(({ root, data }) => {
      const cursor = root.querySelector(".cursor"), at = Math.min(100, (100 * step) / data.last) + "%";
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      cursor.removeAttribute("visibility");
      data.lines.forEach((line, number) => {
        const values = line.values, inside = step >= values[0][0] && step <= values[values.length - 1][0];
        root.querySelectorAll("output")[number].textContent = inside ? short(nearest(values, step)[1]) : "–";
      });
    });
  };
  reader.addEventListener("input", show);
}

// while the run goes on, the page looks for its newer self, but never under somebody's hands
const follow = document.querySelector("#follow");
if (follow) {
  const store = { get: () => { try { return sessionStorage.getItem("follow"); } catch { return null; } },
                  set: (value) => { try { sessionStorage.setItem("follow", value); } catch { /* not kept */ } } };
  let touched = 0;
  follow.checked = store.get() !== "no";
  follow.parentElement.hidden = false;
  follow.addEventListener("change", () => store.set(follow.checked ? "yes" : "no"));
  ["input", "pointerdown", "keydown", "scroll"].forEach((kind) =>
    addEventListener(kind, () => { touched = Date.now(); }, { passive: true }));
  setInterval(() => { if (follow.checked && Date.now() - touched > 20000) location.reload(); }, 20000);
}
