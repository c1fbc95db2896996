// Draws the report from the JSON in the page: curves with switches, three small panels, light and dark.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const palette = {
    light: ["#3b6fd4", "#d9822b", "#0f8a68", "#b5488e", "#6c55c9", "#9a7b14", "#1c93b8", "#7a7f87"],
    dark: ["#7ea6ff", "#f2a65a", "#4fd0a5", "#e58ac3", "#a896ff", "#d9bd55", "#5cc8ea", "#a7adb6"],
  };
  const LATE = 0.2; // the part of a run that is outside the frame at first
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const view = { kind: "eval", by: "step", logx: false, logy: false, late: true };
  const hidden = new Set();
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const theme = () => document.documentElement.dataset.theme;
  const colour = (i) => palette[theme()][i % palette.light.length];
  const narrow = () => innerWidth < 760;
  const short = (x) => (x === null || x === undefined ? "–" : Number(x.toPrecision(5)).toString());

  const time = (arm, run, kind) =>
    arm.step_ms ? run[kind].step.map((s) => (s * arm.step_ms) / 1000) : run[kind].seconds;
  const xs = (arm, run) => (view.by === "step" ? run[view.kind].step : time(arm, run, view.kind));

  // The mean at every step that all runs of the arm reached.
  function mean(arm) {
    const at = new Map();
    arm.runs.forEach((run) => {
      const x = xs(arm, run);
      run[view.kind].step.forEach((s, i) => {
        const entry = at.get(s) || { x: 0, y: 0, n: 0 };
        entry.x += x[i]; entry.y += run[view.kind].value[i]; entry.n += 1;
        at.set(s, entry);
      });
    });
    const whole = [...at.entries()].sort((a, b) => a[0] - b[0]).filter(([, e]) => e.n === arm.runs.length);
    return { step: whole.map(([s]) => s), x: whole.map(([, e]) => e.x / e.n), y: whole.map(([, e]) => e.y / e.n) };
  }

  const axis = (more) => ({
    gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, fixedrange: narrow(),
    tickfont: { size: 12 }, titlefont: { size: 13 }, ...more,
  });
  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--soft") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 }, align: "left" },
    margin: { l: 8, r: 12, t: 8, b: 8 }, ...more,
  });
  const config = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };

  function range(traces) {
    // Frames the data after the first fifth; null leaves the axis to show everything.
    if (!view.late) return [null, null];
    const shown = traces.filter((t) => t.visible !== false && t.x.length);
    const end = Math.max(...shown.flatMap((t) => t.x)), begin = end * LATE;
    const ys = shown.flatMap((t) => t.y.filter((y, i) => t.x[i] >= begin && Number.isFinite(y) && (!view.logy || y > 0)));
    if (!ys.length || !(end > 0)) return [null, null];
    const scale = (v, log) => (log ? Math.log10(v) : v);
    const fit = (low, high, log, pad) => {
      const a = scale(low, log), b = scale(high, log), room = (b - a || Math.abs(b) || 1) * pad;
      return [a - room, b + room];
    };
    return [fit(begin, end, view.logx, 0.02), fit(Math.min(...ys), Math.max(...ys), view.logy, 0.06)];
  }

  function curves() {
    const traces = [];
    const unit = view.by === "step" ? "" : " s";
    const name = view.kind === "eval" ? data.metric : "training loss";
    data.arms.forEach((arm, i) => {
      const visible = !hidden.has(arm.label), shape = { color: colour(i), dash: dashes[Math.floor(i / 8) % 4] };
      arm.runs.forEach((run) => {
        const x = xs(arm, run);
        traces.push({
          x, y: run[view.kind].value, visible, mode: "lines", name: `${arm.label}, seed ${run.seed}`,
          customdata: run[view.kind].step, line: { ...shape, width: 1 }, opacity: view.kind === "train" ? 0.28 : 0.5,
          hovertemplate: `<b>${arm.label}</b> seed ${run.seed}${run.status === "complete" ? "" : ` (${run.status})`}` +
            `<br>step %{customdata}, ${view.by === "step" ? "" : "%{x:.3g} s, "}${name} %{y:.5g}<extra></extra>`,
        });
      });
      if (arm.runs.length > 1) {
        const m = mean(arm);
        traces.push({
          x: m.x, y: m.y, visible, mode: "lines", name: `${arm.label}, mean`, customdata: m.step,
          line: { ...shape, width: view.kind === "train" ? 1.8 : 2.6 },
          hovertemplate: `<b>${arm.label}</b> mean of ${arm.runs.length}<br>step %{customdata}, ${name} %{y:.5g}<extra></extra>`,
        });
      }
    });
    const [xrange, yrange] = range(traces);
    const target = view.kind === "eval" && data.target !== null;
    const shapes = target ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.target, y1: data.target,
      line: { color: css("--faint"), width: 1, dash: "dot" } }] : [];
    const annotations = target ? [{ xref: "paper", x: 0.005, xanchor: "left", yanchor: "top", showarrow: false,
      y: view.logy ? Math.log10(data.target) : data.target, text: `target ${short(data.target)}`,
      font: { size: 12, color: css("--soft") } }] : [];
    const free = (log, r) => ({ type: log ? "log" : "linear", ...(r ? { range: r, autorange: false } : { autorange: true }) });
    Plotly.react("curves", traces, layout({
      shapes, annotations,
      xaxis: axis({ title: { text: view.by === "step" ? "step" : "CPU seconds of training", standoff: 8 }, ...free(view.logx, xrange), ticksuffix: unit }),
      yaxis: axis({ title: narrow() ? undefined : { text: view.kind === "eval" ? data.label : name, standoff: 10 }, ...free(view.logy, yrange) }),
    }), config);
  }

  // One row per optimizer, the first on top.
  const labels = data.arms.map((arm) => arm.label);
  const lines = labels.map((label) => (label.length > 14 ? label.replaceAll(" ", "<br>") : label));
  const rowsAxis = () => axis({ type: "category", tickvals: labels, ticktext: lines, categoryorder: "array", categoryarray: [...labels].reverse(), range: [-0.6, labels.length - 0.4], showgrid: false, fixedrange: true, tickfont: { size: 12.5, color: css("--ink") } });
  const valueAxis = (more) => axis({ fixedrange: true, nticks: 5, tickangle: 0, ...more });

  function finals() {
    const traces = [];
    data.arms.forEach((arm, i) => {
      const ended = arm.runs.filter((run) => run.final !== null);
      traces.push({
        x: ended.map((run) => run.final), y: ended.map(() => arm.label), mode: "markers", customdata: ended.map((run) => run.seed),
        marker: { color: colour(i), size: 8, opacity: 0.65 }, hovertemplate: `<b>${arm.label}</b> seed %{customdata}<br>%{x:.5g}<extra></extra>`,
      });
      if (arm.mean !== null) traces.push({
        x: [arm.mean], y: [arm.label], mode: "markers", marker: { symbol: "line-ns", size: 20, line: { color: colour(i), width: 2.5 } },
        hovertemplate: `<b>${arm.label}</b> mean %{x:.5g}<extra></extra>`,
      });
    });
    Plotly.react("finals", traces, layout({ xaxis: valueAxis(), yaxis: rowsAxis() }), config);
  }

  function forest() {
    const traces = [];
    data.arms.forEach((arm, i) => {
      if (arm.label === data.baseline) traces.push({ x: [0], y: [arm.label], mode: "markers", marker: { symbol: "diamond", size: 9, color: colour(i) }, hovertemplate: "the baseline<extra></extra>" });
      const d = arm.difference;
      if (!d || d.percent === null || d.low === null || d.high === null) return;
      traces.push({
        x: [d.percent], y: [arm.label], mode: "markers", marker: { color: colour(i), size: 9 },
        error_x: { type: "data", symmetric: false, array: [d.high - d.percent], arrayminus: [d.percent - d.low], color: colour(i), thickness: 2, width: 5 },
        hovertemplate: `<b>${arm.label}</b> ${short(d.percent)} %<br>95 %: ${short(d.low)} to ${short(d.high)}<extra></extra>`,
      });
    });
    const zero = { type: "line", yref: "paper", y0: 0, y1: 1, x0: 0, x1: 0, line: { color: css("--faint"), width: 1 } };
    Plotly.react("forest", traces, layout({ shapes: [zero], xaxis: valueAxis({ ticksuffix: " %" }), yaxis: rowsAxis() }), config);
  }

  function costs() {
    const timed = data.arms.map((arm, i) => [arm, i]).filter(([arm]) => arm.step_ms);
    const bars = (value, opacity, text) => ({
      type: "bar", orientation: "h", y: timed.map(([arm]) => arm.label), x: timed.map(([arm]) => value(arm)), width: 0.5,
      marker: { color: timed.map(([, i]) => colour(i)), opacity }, hovertemplate: `<b>%{y}</b> ${text} %{x:.4g} ms<extra></extra>`,
    });
    const traces = timed.length ? [
      bars((arm) => arm.step_ms - arm.optimizer_ms, 0.28, "forward and backward"), bars((arm) => arm.optimizer_ms, 0.95, "optimizer"),
    ] : [];
    const empty = timed.length ? [] : [{ text: "not timed", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }];
    Plotly.react("costs", traces, layout({ barmode: "stack", annotations: empty, xaxis: valueAxis({ rangemode: "tozero" }), yaxis: rowsAxis() }), config);
  }

  function paint() {
    document.getElementById("theme").textContent = theme() === "dark" ? "Light" : "Dark";
    const at = new Map(data.arms.map((arm, i) => [arm.label, i]));
    document.querySelectorAll(".dot[data-arm]").forEach((dot) => { dot.style.background = colour(at.get(dot.dataset.arm)); });
    document.querySelectorAll("[data-set]").forEach((b) => b.setAttribute("aria-pressed", view[b.dataset.set] === b.dataset.value));
    document.querySelectorAll("[data-flip]").forEach((b) => b.setAttribute("aria-pressed", view[b.dataset.flip]));
    document.querySelectorAll("#legend button").forEach((b) => b.setAttribute("aria-pressed", !hidden.has(b.dataset.label)));
    curves(); finals(); forest(); costs();
  }

  const legend = document.getElementById("legend");
  data.arms.forEach((arm) => {
    const button = document.createElement("button"), dot = document.createElement("span");
    button.type = "button"; button.dataset.label = arm.label; button.title = "Show or hide";
    dot.className = "dot"; dot.dataset.arm = arm.label;
    button.append(dot, arm.label);
    button.addEventListener("click", () => { hidden.delete(arm.label) || hidden.add(arm.label); paint(); });
    legend.append(button);
  });
  document.querySelectorAll("[data-set]").forEach((b) => b.addEventListener("click", () => { view[b.dataset.set] = b.dataset.value; paint(); }));
  document.querySelectorAll("[data-flip]").forEach((b) => b.addEventListener("click", () => { view[b.dataset.flip] = !view[b.dataset.flip]; paint(); }));
  document.getElementById("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", theme()); } catch (error) { /* storage is closed for this page */ }
    paint();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
    document.documentElement.dataset.theme = event.matches ? "dark" : "light"; paint();
  });
  const copy = document.getElementById("copy");
  if (copy) copy.addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(document.getElementById("command"));
    getSelection().removeAllRanges(); getSelection().addRange(range);
    copy.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  });
  let wasNarrow = narrow();
  addEventListener("resize", () => { if (narrow() !== wasNarrow) { wasNarrow = narrow(); paint(); } });
  document.querySelectorAll(".panels .plot").forEach((plot) => { plot.style.height = `${Math.max(150, 56 + (lines.some((line) => line.includes("<br>")) ? 50 : 36) * labels.length)}px`; });
  paint();
})();
