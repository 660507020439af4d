/* The explorer: one selection of records, drawn as points and listed as a table. Data: records.js beside it. */
(function () {
  "use strict";
  const KINDS = {
    speed: {
      title: "speed",
      filters: ["optimizer", "table", "pool_size", "block_size", "batch_size", "sparse_gradients"],
      axes: ["parameters_mib", "total_ms"],
      group: "table",
      columns: ["run", "label", "optimizer", "forward_ms", "gradient_ms", "step_ms", "total_ms", "peak_mib"],
    },
    quality: {
      title: "quality",
      filters: ["optimizer", "table", "training", "pool_size", "block_size", "batch_size", "seed", "reference"],
      axes: ["inference_ratio", "gap"],
      group: "table",
      columns: ["run", "table", "optimizer", "training", "seed", "inference_ratio", "gap", "wordsim353_score",
        "train_s", "reference"],
    },
    frontier: {
      title: "frontier",
      filters: ["method", "optimizer", "training", "pool_size", "block_size", "batch_size", "seed", "reference"],
      axes: ["inference_ratio", "gap"],
      group: "method",
      columns: ["run", "method", "optimizer", "seed", "inference_ratio", "training_ratio", "gap",
        "wordsim353_score", "reference"],
    },
  };
  const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a8a00", "#888888"];
  const SHAPES = ["circle", "square", "triangle", "diamond", "cross"];
  const MARGIN = { top: 12, right: 16, bottom: 46, left: 64 };
  const HEIGHT = 400;
  const SVG = "http://www.w3.org/2000/svg";
  const root = document.getElementById("explorer");
  const state = {};

  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function drawn(tag, attributes, parent, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  const isList = (cell) => cell.startsWith("[") || cell.startsWith("{");
  const isNumber = (cell) => cell !== "" && Number.isFinite(Number(cell));

  function shown(cell) {
    if (!isNumber(cell)) return cell;
    const value = Number(cell);
    return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
  }

  function compare(a, b) {
    if (isNumber(a) && isNumber(b)) return Number(a) - Number(b);
    if ((a === "") !== (b === "")) return a === "" ? 1 : -1;
    return a < b ? -1 : Number(a > b);
  }

  function selectOf(label, options, value, onChange) {
    const select = element("select", { "aria-label": label });
    for (const [key, text] of options) {
      const option = element("option", { value: key }, text);
      option.selected = key === value;
      select.append(option);
    }
    select.addEventListener("change", () => onChange(select.value));
    return element("label", {}, element("span", {}, label), select);
  }

  function checkbox(label, value, onChange) {
    const input = element("input", { type: "checkbox" });
    input.checked = value;
    input.addEventListener("change", () => onChange(input.checked));
    return element("label", { class: "check" }, input, element("span", {}, label));
  }

  function load(kind) {
    const { columns, rows } = window.cembRecords[kind];
    const place = Object.fromEntries(columns.map((name, i) => [name, i]));
    const plain = columns.filter((name, i) => !rows.some((row) => isList(row[i])));
    const numeric = plain.filter((name) => {
      const cells = rows.map((row) => row[place[name]]).filter((cell) => cell !== "");
      return cells.length > 0 && cells.every(isNumber);
    });
    const groups = [...new Set(rows.map((row) => row[place[KINDS[kind].group]]))].sort();
    Object.assign(state, {
      kind, columns, rows, place, plain, numeric, groups,
      x: KINDS[kind].axes[0], y: KINDS[kind].axes[1], logX: true, logY: kind === "speed",
      filters: {}, text: "", sort: null, descending: false, chosen: null,
    });
  }

  const cell = (row, name) => (name in state.place ? row[state.place[name]] : "");

  // A run of this study has a page; those of a reference machine have one together.
  const page = (row) => {
    const [run, reference] = [cell(row, "run"), cell(row, "reference")];
    const name = `${reference}-records`;
    return `runs/${reference ? `reference-${name}.html#provenance-${name}-${run}` : `${run}.html`}`;
  };

  function selection() {
    const text = state.text.toLowerCase();
    const found = state.rows.filter((row) =>
      Object.entries(state.filters).every(([name, value]) => value === "" || cell(row, name) === value.slice(1))
      && (!text || state.plain.some((name) => cell(row, name).toLowerCase().includes(text))));
    if (state.sort !== null) {
      found.sort((a, b) => compare(cell(a, state.sort), cell(b, state.sort)) * (state.descending ? -1 : 1));
    }
    return found;
  }

  function csv(rows) {
    // Text that a spreadsheet would take for a formula begins with an apostrophe, as in cemb/report/export.py.
    const isFormula = /^(?:[=@\t\r]|[+-](?!\d*\.?\d+(e[+-]?\d+)?$))/i;
    const plain = (value) => (isFormula.test(value) ? `'${value}` : value);
    const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
    return [state.columns, ...rows.map((row) => row.map(plain))]
      .map((row) => row.map(quoted).join(",") + "\n").join("");
  }

  function ticks(low, high, isLog) {
    if (isLog) {
      const found = [];
      const steps = Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
        for (const step of steps) found.push(step * 10 ** power);
      }
      return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    }
    const rough = (high - low) / 6;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i += 1) found.push(i * step);
    return found;
  }

  function scale(values, isLog, from, to) {
    let low = Math.min(...values);
    let high = Math.max(...values);
    if (isLog) {
      [low, high] = low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
    } else {
      const room = high === low ? Math.abs(high) || 1 : (high - low) * 0.05;
      [low, high] = [low - room, high + room];
    }
    const warp = isLog ? Math.log10 : (value) => value;
    const at = (value) => from + ((warp(value) - warp(low)) / (warp(high) - warp(low))) * (to - from);
    return { at, ticks: ticks(low, high, isLog) };
  }

  function tickText(value) {
    return Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3)
      ? value.toExponential().replace("e+", "e")
      : Number(value.toPrecision(6)).toLocaleString("en", { maximumFractionDigits: 6 });
  }

  function mark(shape, x, y, colour, parent) {
    const r = 5;
    const paths = {
      circle: `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
      square: `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
      triangle: `M${x},${y - r}l${r},${2 * r}h${-2 * r}z`,
      diamond: `M${x},${y - r - 1}l${r + 1},${r + 1}l${-r - 1},${r + 1}l${-r - 1},${-r - 1}z`,
      cross: `M${x - r},${y - r}l${2 * r},${2 * r}m0,${-2 * r}l${-2 * r},${2 * r}`,
    };
    return drawn("path", { d: paths[shape], fill: shape === "cross" ? "none" : colour, stroke: colour,
      "stroke-width": shape === "cross" ? 2 : 1, "fill-opacity": 0.75 }, parent);
  }

  const style = (group) => {
    const i = state.groups.indexOf(group);
    return [COLOURS[i % COLOURS.length], SHAPES[Math.floor(i / COLOURS.length + i) % SHAPES.length]];
  };

  function plot(rows, holder, note) {
    holder.replaceChildren();
    const points = rows
      .map((row) => ({ row, x: cell(row, state.x), y: cell(row, state.y) }))
      .filter((point) => isNumber(point.x) && isNumber(point.y))
      .map((point) => ({ ...point, x: Number(point.x), y: Number(point.y) }));
    const usable = points.filter((p) => (!state.logX || p.x > 0) && (!state.logY || p.y > 0));
    const left = rows.length - usable.length;
    note.textContent = `${usable.length} points`
      + (left ? `; ${left} records have no ${state.x} or ${state.y}, or none that a log axis can show` : "");
    if (!usable.length) return usable;
    const width = Math.max(holder.clientWidth, 280);
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img",
      "aria-label": `${state.y} against ${state.x} of ${usable.length} records; the table below lists them` },
    holder);
    const x = scale(usable.map((p) => p.x), state.logX, MARGIN.left, width - MARGIN.right);
    const y = scale(usable.map((p) => p.y), state.logY, HEIGHT - MARGIN.bottom, MARGIN.top);
    const bottom = HEIGHT - MARGIN.bottom;
    let last = -Infinity; // where the last label stands
    for (const value of x.ticks) {
      const at = x.at(value);
      drawn("line", { x1: at, x2: at, y1: MARGIN.top, y2: bottom, class: "grid" }, svg);
      if (at - last < 52) continue;
      last = at;
      drawn("text", { x: at, y: bottom + 18, "text-anchor": "middle" }, svg, tickText(value));
    }
    for (const value of y.ticks) {
      const at = y.at(value);
      drawn("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at, class: "grid" }, svg);
      drawn("text", { x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" }, svg, tickText(value));
    }
    drawn("text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, svg,
      state.x + (state.logX ? " (log)" : ""));
    drawn("text", { transform: `translate(14 ${(MARGIN.top + bottom) / 2}) rotate(-90)`,
      "text-anchor": "middle" }, svg, state.y + (state.logY ? " (log)" : ""));
    for (const point of usable) {
      const [colour, shape] = style(cell(point.row, KINDS[state.kind].group));
      const path = mark(shape, x.at(point.x), y.at(point.y), colour, svg);
      path.classList.add("point");
      path.addEventListener("pointerenter", () => choose(point.row));
      path.addEventListener("click", () => window.location.assign(page(point.row)));
    }
    return usable;
  }

  function choose(row) {
    const panel = root.querySelector(".record");
    const list = element("dl", {});
    for (const name of state.plain) {
      if (cell(row, name) !== "") {
        list.append(element("div", {}, element("dt", {}, name), element("dd", {}, cell(row, name))));
      }
    }
    panel.replaceChildren(element("p", {}, "One record, of the run ",
      element("a", { href: page(row) }, cell(row, "run"))), list);
  }

  function legend(points, holder) {
    holder.replaceChildren();
    for (const group of state.groups) {
      if (!points.some((point) => cell(point.row, KINDS[state.kind].group) === group)) continue;
      const svg = document.createElementNS(SVG, "svg");
      svg.setAttribute("width", 16);
      svg.setAttribute("height", 16);
      svg.setAttribute("aria-hidden", "true");
      const [colour, shape] = style(group);
      mark(shape, 8, 8, colour, svg);
      holder.append(element("span", {}, svg, group));
    }
  }

  function table(rows, holder) {
    const columns = KINDS[state.kind].columns.filter((name) => name in state.place);
    const head = element("tr", {});
    for (const name of columns) {
      const sorted = state.sort === name;
      const order = sorted ? (state.descending ? "descending" : "ascending") : "none";
      const button = element("button", { type: "button" }, name + { ascending: " ▲", descending: " ▼", none: "" }[order]);
      button.addEventListener("click", () => {
        state.descending = sorted && !state.descending;
        state.sort = name;
        refresh();
        root.querySelector(`th[data-column="${name}"] button`).focus();
      });
      head.append(element("th", { scope: "col", "aria-sort": order, "data-column": name }, button));
    }
    const body = element("tbody", {});
    for (const row of rows) {
      const line = element("tr", {});
      for (const name of columns) {
        const text = cell(row, name);
        const content = name === "run" ? element("a", { href: page(row) }, text) : shown(text);
        line.append(element("td", isNumber(text) ? { class: "number" } : {}, content));
      }
      line.addEventListener("pointerenter", () => choose(row));
      body.append(line);
    }
    holder.replaceChildren(element("table", {}, element("thead", {}, head), body));
  }

  function refresh() {
    const rows = selection();
    const points = plot(rows, root.querySelector(".plot"), root.querySelector(".note"));
    legend(points, root.querySelector(".legend"));
    table(rows, root.querySelector(".listing"));
    root.querySelector(".count").textContent = `${rows.length} of ${state.rows.length} records`;
  }

  function build(kind) {
    load(kind);
    const kinds = Object.entries(KINDS).filter(([name]) => window.cembRecords[name]?.rows.length);
    const axes = state.numeric.map((name) => [name, name]);
    const controls = element("div", { class: "controls" },
      selectOf("records of", kinds.map(([name, { title }]) => [name, title]), kind, build),
      selectOf("across", axes, state.x, (value) => { state.x = value; refresh(); }),
      selectOf("up", axes, state.y, (value) => { state.y = value; refresh(); }),
      checkbox("log across", state.logX, (value) => { state.logX = value; refresh(); }),
      checkbox("log up", state.logY, (value) => { state.logY = value; refresh(); }));
    const filters = element("div", { class: "controls" });
    for (const name of KINDS[kind].filters) {
      const values = [...new Set(state.rows.map((row) => cell(row, name)))].sort(compare);
      if (values.length < 2) continue;
      const options = [["", "all"], ...values.map((value) => ["=" + value, shown(value) || "none"])];
      filters.append(selectOf(name, options, "", (value) => { state.filters[name] = value; refresh(); }));
    }
    const search = element("input", { type: "search", "aria-label": "search the records" });
    search.addEventListener("input", () => { state.text = search.value; refresh(); });
    filters.append(element("label", {}, element("span", {}, "search"), search));
    const download = element("button", { type: "button", class: "download" }, "Download these as CSV");
    download.addEventListener("click", () => {
      const link = element("a", { download: `${state.kind}.csv`,
        href: URL.createObjectURL(new Blob([csv(selection())], { type: "text/csv" })) });
      link.click();
      URL.revokeObjectURL(link.href);
    });
    root.replaceChildren(controls, filters, element("div", { class: "plot" }),
      element("p", { class: "note" }), element("div", { class: "legend" }),
      element("div", { class: "record", "aria-live": "polite" }, element("p", {},
        "Point at a record to see all of it; a click on its point opens its run.")),
      element("p", { class: "tools" }, element("span", { class: "count", role: "status" }), download),
      element("div", { class: "listing", role: "region", tabindex: "0", "aria-label": "table of the records" }));
    refresh();
  }

  build("speed");
  let width = root.clientWidth;
  new ResizeObserver(() => {
    if (root.clientWidth !== width) {
      width = root.clientWidth;
      refresh();
    }
  }).observe(root);
})();
