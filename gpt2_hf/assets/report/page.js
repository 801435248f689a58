// What the reader does with the plots: another x axis, a run hidden, light or dark; kept over a reload.
(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("page").textContent);
  const inks = {
    light: { paper: "#ffffff", text: "#3b434b", grid: "#e3e6ea", axis: "#8a939c", mark: "#555d66" },
    dark: { paper: "#14181c", text: "#c3cad1", grid: "#2b333b", axis: "#76808a", mark: "#a9b2bb" },
  };
  const palettes = {
    light: ["#2563a8", "#c4541a", "#3f8f4f", "#8b4fa3", "#9a7410", "#257f8b", "#a03a52", "#5f6670"],
    dark: ["#6fa8e8", "#f0904f", "#7cc98b", "#c697dc", "#d9b44a", "#62c0cc", "#e98aa0", "#b0b8c1"],
  };
  const units = [[1e9, "B"], [1e6, "M"], [1e3, "K"]];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const storageKey = `report ${location.pathname}`;
  const hidden = new Set();
  let axis = "tokens";

  window.reportNumber = (number) => {
    const size = Math.abs(number);
    if (size && size < 0.01) return (+number.toPrecision(4)).toExponential();
    const [unitSize, unit] = units.find(([unitSize]) => size >= unitSize) ?? [1, ""];
    return `${+(number / unitSize).toPrecision(4)}${unit}`;
  };
  window.reportTick = (tick) => {
    if (axis === "hours") return `${+tick.toPrecision(6)} h`;
    return (axis === "dollars" ? "$" : "") + window.reportNumber(tick);
  };

  // The values of all curves where the pointer is, in one box beside it.
  window.reportHover = (plot, event, form) => {
    const box = document.getElementById("values");
    const curves = plot ? plot.renderers.filter(({ name, visible }) => name && visible) : [];
    const found = curves.map((curve) => ({ curve, point: nearest(curve.data_source, event.x) })).filter((f) => f.point);
    box.hidden = !found.length;
    if (box.hidden) return;
    const { point: first } = found.reduce((a, b) => (b.point.distance < a.point.distance ? b : a));
    box.replaceChildren(element("b", Object.keys(page.ends).map((name) => place(name, first[name])).join(", ")));
    for (const { curve, point } of found) {
      const row = element("div"), swatch = element("span");
      swatch.className = "swatch";
      swatch.style.borderTopColor = palettes[theme()][curve.glyph.tags[0]];
      const elsewhere = point.tokens === first.tokens ? "" : ` at ${place("tokens", point.tokens)}`;
      row.append(swatch, `${curve.name} `, element("b", write(point.value, form)), elsewhere);
      box.append(row);
    }
    const root = document.querySelector(`[data-root-id="${plot.id}"]`); // a box of no size around the plot's
    const around = root.firstElementChild.getBoundingClientRect();
    const x = around.left + event.sx + 14, y = around.top + event.sy + 14;
    const { offsetWidth: width, offsetHeight: height } = box, { clientWidth, clientHeight } = document.documentElement;
    box.style.left = `${Math.max(4, x + width > clientWidth ? Math.min(x - width - 28, clientWidth - width) : x)}px`;
    box.style.top = `${Math.max(4, Math.min(y, clientHeight - height - 4))}px`;
  };

  function nearest(source, x) {
    const columns = Object.fromEntries([...Object.keys(page.ends), "value"].map((key) => [key, source.get_column(key)]));
    const along = columns[axis];
    let best = -1;
    for (let i = 0; i < along.length; i++) {
      if (isFinite(columns.value[i]) && (best < 0 || Math.abs(along[i] - x) < Math.abs(along[best] - x))) best = i;
    }
    if (best < 0) return null;
    const point = Object.fromEntries(Object.entries(columns).map(([key, column]) => [key, column[best]]));
    return { ...point, distance: Math.abs(along[best] - x) };
  }

  function element(tag, text = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  }

  function write(value, [kind, digits]) {
    if (kind === "percent") return `${(100 * value).toFixed(digits)}%`;
    if (kind === "exponent") return value.toExponential(digits);
    return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  }

  function place(name, value) {
    if (name === "dollars") return `$${write(value, ["fixed", 2])}`;
    if (name === "hours") return `${write(value, ["fixed", value < 1 ? 3 : 1])} h`;
    return name === "steps" ? `step ${write(value, ["fixed", 0])}` : `${window.reportNumber(value)} tokens`;
  }

  const plots = () => Bokeh.documents[0].roots();
  const details = () => [...document.querySelectorAll("details")];
  const xRange = () => plots()[0].x_range;

  function theme() {
    return dark.matches ? "dark" : "light";
  }

  function showTheme() {
    const name = theme(), ink = inks[name];
    for (const plot of plots()) {
      for (const part of [...plot.left, ...plot.below]) {
        part.setv({ axis_label_text_color: ink.text, major_label_text_color: ink.text, axis_line_color: ink.axis,
          major_tick_line_color: ink.axis });
      }
      for (const part of plot.center) {
        if ("grid_line_color" in part) part.grid_line_color = ink.grid;
        else if ("text_color" in part) {
          part.setv({ text_color: ink.mark, background_fill_color: ink.paper, background_fill_alpha: 0.75 });
        }
        else if ("location" in part) part.line_color = ink.mark;
      }
      for (const renderer of plot.renderers) {
        const color = palettes[name][renderer.glyph.tags[0]];
        for (const glyph of [renderer.glyph, renderer.muted_glyph, renderer.nonselection_glyph]) {
          if (glyph && "line_color" in glyph) glyph.line_color = color;
          if (glyph && "fill_color" in glyph) glyph.fill_color = color;
        }
      }
    }
    for (const swatch of document.querySelectorAll("[data-color]")) {
      swatch.style.borderTopColor = palettes[name][swatch.dataset.color];
    }
  }

  function showAxis(name) {
    axis = name;
    const end = page.ends[name] || 1, start = -0.015 * end;
    for (const plot of plots()) {
      for (const { glyph } of plot.renderers) {
        for (const coordinate of ["x", "x0", "x1"]) if (coordinate in glyph) glyph[coordinate] = { field: name };
      }
      for (const part of plot.below) part.axis_label = page.labels[name];
    }
    xRange().setv({ start, end: -start + end, reset_start: start, reset_end: -start + end });
    press("[data-axis]", (button) => button.dataset.axis === name);
  }

  function showRuns() {
    for (const plot of plots()) {
      for (const renderer of plot.renderers) renderer.visible = !hidden.has(renderer.glyph.tags[1]);
    }
    press("[data-run]", (button) => !hidden.has(+button.dataset.run));
  }

  function press(selector, isPressed) {
    for (const button of document.querySelectorAll(selector)) button.setAttribute("aria-pressed", isPressed(button));
  }

  function remember() {
    const ranges = [xRange(), ...plots().map((plot) => plot.y_range)].map(({ start, end }) => [start, end]);
    try {
      const open = details().map((part) => part.open);
      const state = { axis, hidden: [...hidden], ranges, atEnd: page.ends[axis], open };
      sessionStorage.setItem(storageKey, JSON.stringify(state));
    } catch { /* without storage a reload begins anew */ }
  }

  function recall() {
    let state = null;
    try {
      state = JSON.parse(sessionStorage.getItem(storageKey));
    } catch { /* as above */ }
    if (!state || !(state.axis in page.ends) || state.ranges.length !== plots().length + 1) return;
    showAxis(state.axis);
    state.hidden.forEach((run) => hidden.add(run));
    details().forEach((part, i) => { part.open = state.open[i] ?? false; });
    const [[start, end], ...ys] = state.ranges;
    const isZoomed = Math.abs(start + 0.015 * state.atEnd) > 1e-6 * state.atEnd ||
      Math.abs(end - 1.015 * state.atEnd) > 1e-6 * state.atEnd;
    if (!isZoomed) return; // new rows are in view
    xRange().setv({ start, end });
    plots().forEach((plot, i) => plot.y_range.setv({ start: ys[i][0], end: ys[i][1] }));
  }

  function begin() {
    if (!window.Bokeh?.documents.length) return void setTimeout(begin, 20);
    if (window.matchMedia("(pointer: coarse)").matches) {
      for (const plot of plots()) plot.toolbar.active_drag = null; // a finger scrolls the page
    }
    showTheme();
    showAxis(axis);
    recall();
    showRuns();
    dark.addEventListener("change", showTheme);
    document.addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (button?.dataset.axis) showAxis(button.dataset.axis);
      if (button?.dataset.run) {
        const run = +button.dataset.run;
        if (!hidden.delete(run)) hidden.add(run);
        showRuns();
      }
    });
    window.addEventListener("pagehide", remember);
    if (page.refresh_s) setTimeout(() => location.reload(), 1000 * page.refresh_s);
  }
  begin();
})();
