"use strict";
// The figures. Plotly is unpacked and run only after everything else can be used: it takes longest.

const COLORS = 8; // --line-0 to --line-7 in report.css
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const UNITS = { documents: "documents", step: "steps", seconds: "seconds of training", length: "completion length, tokens" };

const figures = []; // { panel, place }

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function colorOf(line) {
  const name = data.groups[line.group] ?? line.name;
  if (/^(.*: )?base\b/.test(name)) {
    return css("--line-base");
  }
  const extra = [...new Set(data.panels.length.flatMap((panel) => panel.lines).filter((other) => other.group === null)
    .map((other) => other.name))];
  const place = line.group ?? data.groups.length + extra.indexOf(line.name);
  return css(`--line-${place % COLORS}`);
}

// Plotly reads a little markup in names: a run called <b> is shown as it is called.
function escaped(text) {
  return visible(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function dashOf(line) {
  return DASHES[line.style % DASHES.length];
}

// What the lines of a panel are of, each with its dashes: [] unless there are several.
function kinds(panel) {
  const found = new Map(panel.lines.map((line) => [line.of, line]));
  return found.size > 1 ? [...found.values()] : [];
}

// A legend of dashes; colors are named once, above all figures.
function keys(panel) {
  return kinds(panel).map((line) => ({
    x: [null], y: [null], name: escaped(line.of), type: "scatter", mode: "lines", hoverinfo: "skip",
    line: { color: css("--text-soft"), width: 2.2, dash: dashOf(line) },
  }));
}

function traces(panel, axis) {
  const widest = panel.lines.map((line) => line.x[axis]).flat();
  return panel.lines.flatMap((line) => {
    const color = colorOf(line);
    const across = line.level && widest.length > 1;
    const ends = [Math.min(...widest), Math.max(...widest)];
    const x = across ? ends : line.x[axis];
    const twice = (values) => (across ? [values[0], values[0]] : values);
    const [mean, low, high] = [twice(line.mean), twice(line.low), twice(line.high)];
    const drawn = { x, y: mean, name: escaped(line.name), type: "scatter", legendgroup: line.name };
    drawn.mode = across || x.length > 30 ? "lines" : "lines+markers";
    drawn.line = { color, width: across || line.style === 2 ? 1.5 : 2.2, dash: dashOf(line) };
    drawn.showlegend = kinds(panel).length < 2;
    drawn.marker = { color, size: x.length > 1 ? 5 : 9 };
    const known = x.map((_, i) => i).filter((i) => low[i] !== null);
    if (known.length === 0) {
      return [drawn];
    }
    const there = known.map((i) => x[i]);
    const band = { x: [...there, ...there.toReversed()], type: "scatter", mode: "lines", fill: "toself", hoverinfo: "skip" };
    band.y = [...known.map((i) => high[i]), ...known.map((i) => low[i]).toReversed()];
    band.line = { color, width: known.length === 1 ? 2 : 0 }; // of one point: an error bar
    return [{ ...band, fillcolor: color, opacity: 0.18, showlegend: false, legendgroup: line.name }, drawn];
  });
}

function lowest(panel) {
  return Math.min(...panel.lines.flatMap((line) => [...line.mean, ...line.low]).filter((value) => value !== null));
}

function layout(panel, axis) {
  const grid = { gridcolor: css("--grid"), zeroline: false, linecolor: css("--grid"), automargin: true };
  const x = { ...grid, title: { text: UNITS[axis], standoff: 8 } };
  if (axis === "length") {
    const lengths = [...new Set(panel.lines.flatMap((line) => line.x.length))].sort((a, b) => a - b);
    Object.assign(x, { type: "log", tickvals: lengths, ticktext: lengths.map(String) });
  }
  const named = panel.lines.some((line) => line.name !== data.groups[line.group]);
  return {
    xaxis: x,
    yaxis: { ...grid, rangemode: lowest(panel) < 0 ? "normal" : "nonnegative", title: { text: panel.unit, standoff: 8 } },
    margin: { l: 8, r: 12, t: 8, b: 8 },
    height: named ? 310 : 270,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--font"), size: 12, color: css("--text-soft") },
    hovermode: "x unified",
    hoverlabel: { bgcolor: css("--surface"), bordercolor: css("--grid"), font: { color: css("--text") } },
    showlegend: named,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--text-soft"), activecolor: css("--text") },
  };
}

function draw({ panel, place }) {
  const chosen = document.querySelector("input[name=axis]:checked").value;
  const axis = panel.axis === "training" ? chosen : panel.axis;
  const options = { displaylogo: false, responsive: true, displayModeBar: false };
  return Plotly.react(place, [...traces(panel, axis), ...keys(panel)], layout(panel, axis), options);
}

function frames() {
  for (const [section, panels] of Object.entries(data.panels)) {
    const into = document.querySelector(`#${section} .figures`);
    for (const panel of panels) {
      const place = element("div", { class: "plot", role: "img", "aria-label": panel.title });
      const figure = element("figure", {}, element("figcaption", {}, visible(panel.title)), place);
      into.append(figure);
      if (panel.lines.length) {
        figures.push({ panel, place });
      } else {
        place.replaceWith(element("p", { class: "empty" }, panel.empty));
      }
    }
  }
  document.getElementById("legend").hidden = data.groups.length < 2;
  data.groups.forEach((name, group) => {
    const swatch = element("span", { class: "swatch" });
    swatch.style.background = colorOf({ group, name });
    document.getElementById("legend").append(element("li", {}, swatch, visible(name)));
  });
}

async function startPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = element("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

// One figure at a time, with room between them for what the reader does meanwhile.
async function drawAll() {
  for (const figure of figures) {
    await draw(figure);
    await new Promise((done) => setTimeout(done));
  }
}

async function startFigures() {
  try {
    await startPlotly();
    await drawAll();
    document.getElementById("axis").addEventListener("change", drawAll);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    performance.mark("figures-drawn");
  } catch (error) {
    for (const { place } of figures) {
      place.replaceWith(element("p", { class: "empty" }, `This browser cannot draw the figures: ${error.message}`));
    }
    throw error;
  }
}

frames();
// After the first painting, and after the script below has set up the viewer.
requestAnimationFrame(() => setTimeout(startFigures));
