// Shows the values under the pointer. The page is complete without this script.
(() => {
  const tip = document.getElementById("tip");
  const add = (parent, tag, text, name) => {
    const made = parent.appendChild(document.createElement(tag));
    made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const read = (curve) => {
    curve.read ??= {
      steps: curve.dataset.steps.split(",").map(Number),
      values: curve.dataset.values.split(","),
    };
    return curve.read;
  };
  // Index of the step nearest to `step`; `steps` are ascending.
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  };
  const hide = () => {
    tip.hidden = true;
    document.querySelectorAll(".cursor").forEach((c) => c.setAttribute("visibility", "hidden"));
  };
  const show = (svg, event) => {
    const box = svg.getBoundingClientRect();
    const [left, right, last] = [+svg.dataset.left, +svg.dataset.right, +svg.dataset.last];
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const step = Math.min(1, Math.max(0, (x - left) / (right - left))) * last;
    const rows = [];
    for (const curve of svg.querySelectorAll(".curve")) {
      if (getComputedStyle(curve).display === "none") continue;
      const { steps, values } = read(curve), i = nearest(steps, step);
      if (values[i] !== "") rows.push([steps[i], values[i], curve]);
    }
    if (!rows.length) return hide();
    const near = rows.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a))[0];
    tip.replaceChildren();
    add(tip, "small", `step ${near.toLocaleString("en")}`);
    for (const [at, value, curve] of rows.slice(0, 16)) {
      const row = add(tip, "p", "", curve.getAttribute("class").replace(/\b(curve|run-\S+)/g, ""));
      add(row, "span", "", "swatch");
      add(row, "span", curve.dataset.name + (Math.abs(at - near) < last / 50 ? "" : ` (step ${at.toLocaleString("en")})`));
      add(row, "b", value);
    }
    if (rows.length > 16) add(tip, "small", `and ${rows.length - 16} more`);
    const cursor = svg.querySelector(".cursor"), place = left + (near / last) * (right - left);
    cursor.setAttribute("transform", `translate(${place} 0)`);
    cursor.setAttribute("visibility", "visible");
    tip.hidden = false;
    const beyond = event.clientX + 18 + tip.offsetWidth > innerWidth;
    tip.style.left = `${Math.max(4, beyond ? event.clientX - 14 - tip.offsetWidth : event.clientX + 18)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)}px`;
  };
  document.querySelectorAll(".panel svg").forEach((svg) => {
    svg.querySelectorAll(".curve > title").forEach((title) => title.remove());
    svg.addEventListener("pointermove", (event) => show(svg, event));
    svg.addEventListener("pointerdown", (event) => show(svg, event));
    svg.addEventListener("pointerleave", hide);
  });
})();
