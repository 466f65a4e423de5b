"use strict";
// The rollout viewer: choose a step, a context, and read its rollouts token by token.

const DARKEST = 8; // nats below which a token's background is at its strongest
const PREVIEW = 120; // characters of a context in the list, its last ones

const at = Object.fromEntries(["step", "filter", "order", "shown", "contexts", "where", "context", "sort", "direction",
  "completions", "viewer"].map((id) => [id, document.getElementById(id)]));
const steps = new Map(); // index -> contexts, read when first chosen
let listed = []; // the contexts that pass the filter, in order
let current = 0; // place in `listed`

function contextsOf(index) {
  if (!steps.has(index)) {
    const contexts = JSON.parse(document.getElementById(`rollouts-${index}`).textContent);
    for (const context of contexts) {
      const advantages = context.rollouts.map((rollout) => rollout.advantage ?? 0);
      context.spread = Math.max(...advantages) - Math.min(...advantages);
      context.rollouts.forEach((rollout, i) => { rollout.sampled = i; });
    }
    steps.set(index, contexts);
  }
  return steps.get(index);
}

function searched(context) {
  context.text ??= [context.context + context.reference, ...context.rollouts.map((rollout) => rollout.tokens.join(""))]
    .join("\n").toLowerCase();
  return context.text;
}

function list() {
  const step = data.steps[at.step.value];
  const all = contextsOf(Number(at.step.value));
  const wanted = at.filter.value.toLowerCase();
  listed = all.filter((context) => !wanted || searched(context).includes(wanted));
  if (at.order.value !== "document") {
    listed.sort((a, b) => b[at.order.value] - a[at.order.value]);
  }
  const left = step.kept < step.contexts ? `, of ${format(step.contexts)} in the run's folder` : "";
  at.shown.textContent = `${format(listed.length)} of ${format(all.length)} contexts${left}`;
  at.contexts.replaceChildren(...listed.map(entry));
  choose(0);
}

function entry(context, place) {
  const key = at.order.value === "spread" || context.loss === null ? "spread" : "loss";
  const item = element("li", { role: "option", tabindex: "-1", "aria-selected": "false" },
    element("span", { class: "end" }, visible(context.context.slice(-PREVIEW).replace(/\s+/g, " ").trim()) || "(start)"),
    element("span", { class: "figure" }, format(Number(context[key].toPrecision(2)))));
  item.addEventListener("click", () => choose(place));
  return item;
}

function choose(place, focus = false) {
  const items = at.contexts.children;
  items[current]?.setAttribute("aria-selected", "false");
  items[current]?.setAttribute("tabindex", "-1");
  current = Math.max(0, Math.min(place, listed.length - 1));
  const item = items[current];
  if (item) {
    item.setAttribute("aria-selected", "true");
    item.setAttribute("tabindex", "0");
    // Scrolls the list and not the page.
    const { offsetTop, offsetHeight } = item;
    if (offsetTop < at.contexts.scrollTop || offsetTop + offsetHeight > at.contexts.scrollTop + at.contexts.clientHeight) {
      at.contexts.scrollTop = offsetTop - at.contexts.clientHeight / 3;
    }
    if (focus) {
      item.focus({ preventScroll: true });
    }
  }
  document.getElementById("before").disabled = current <= 0;
  document.getElementById("after").disabled = current >= listed.length - 1;
  show(listed[current]);
}

function show(context) {
  document.getElementById("group").hidden = context === undefined;
  if (context === undefined) {
    return;
  }
  at.where.textContent = `document ${context.document}, token ${context.block}`;
  if (context.loss !== null) {
    at.where.append(element("span", { class: "muted" }, ` feature-matching loss ${format(context.loss)}`));
  }
  at.context.replaceChildren(visible(context.context), element("mark", {}, shownToken(context.reference)));
  at.context.scrollTop = at.context.scrollHeight;
  const up = at.direction.getAttribute("aria-pressed") === "true";
  const key = at.sort.value;
  // Sampled: 0, 1, 2; all else the largest first.
  const sign = (key === "sampled") === up ? -1 : 1;
  const sorted = context.rollouts.toSorted((a, b) => sign * ((a[key] ?? 0) - (b[key] ?? 0)));
  const largest = Math.max(...context.rollouts.map((rollout) => Math.abs(rollout.advantage ?? 0)), 1e-9);
  at.completions.replaceChildren(...sorted.map((rollout) => completion(rollout, largest)));
}

function shownToken(text) {
  return visible(text).replaceAll("\n", "\u21b5\n");
}

function completion(rollout, largest) {
  const words = element("p", { class: "words" }, ...rollout.tokens.map((text, i) => token(text, rollout.log_probs[i])));
  const bar = element("span", { class: rollout.advantage < 0 ? "bar below" : "bar above" });
  bar.style.setProperty("--share", Math.abs(rollout.advantage ?? 0) / largest);
  const numbers = element("dl", {});
  for (const key of ["advantage", "reward", "alignment", "diversity", "log_prob"]) {
    if (rollout[key] === undefined) { // RLVR has no features, EBFT's reward is a sum of two
      continue;
    }
    const term = element("dt", {}, key.replace("_", "-"));
    numbers.append(element("div", { "data-key": key }, term, element("dd", {}, format(rollout[key]))));
  }
  return element("li", {}, element("span", { class: "scale-of-advantage", "aria-hidden": "true" }, bar), words, numbers);
}

function token(text, logProb) {
  const made = element("span", { class: "token" }, shownToken(text));
  if (logProb !== undefined && logProb !== null) {
    made.style.setProperty("--surprise", Math.min(1, -logProb / DARKEST));
    made.title = `log-prob ${format(logProb)}, probability ${format(Number(Math.exp(logProb).toPrecision(3)))}`;
  }
  return made;
}

function stepBy(count) {
  const wanted = at.step.selectedIndex + count;
  if (wanted >= 0 && wanted < at.step.options.length) {
    at.step.selectedIndex = wanted;
    list();
  }
}

function onKey(event) {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) {
    return;
  }
  const inList = event.target.closest("#contexts") !== null;
  const actions = {
    ArrowLeft: () => choose(current - 1, inList),
    ArrowRight: () => choose(current + 1, inList),
    "[": () => stepBy(-1),
    "]": () => stepBy(1),
    "/": () => at.filter.focus(),
  };
  if (inList) { // elsewhere these scroll
    actions.ArrowUp = actions.ArrowLeft;
    actions.ArrowDown = actions.ArrowRight;
    actions.Home = () => choose(0, true);
    actions.End = () => choose(listed.length - 1, true);
  }
  if (actions[event.key]) {
    event.preventDefault();
    actions[event.key]();
  }
}

function startViewer() {
  if (data.steps.length === 0) {
    document.querySelector("#rollouts .empty").hidden = false;
    return;
  }
  const runs = new Map();
  data.steps.forEach(({ run, step }, index) => {
    if (!runs.has(run)) {
      runs.set(run, element("optgroup", { label: visible(run) }));
    }
    runs.get(run).append(element("option", { value: String(index) }, String(step)));
  });
  at.step.append(...(runs.size > 1 ? runs.values() : runs.values().next().value.children));
  at.step.value = String(data.steps.length - 1);
  at.viewer.hidden = false;
  at.step.addEventListener("change", list);
  at.order.addEventListener("change", list);
  at.filter.addEventListener("input", list);
  at.sort.addEventListener("change", () => show(listed[current]));
  at.direction.addEventListener("click", () => {
    const up = at.direction.getAttribute("aria-pressed") !== "true";
    at.direction.setAttribute("aria-pressed", String(up));
    at.direction.textContent = up ? "\u2191" : "\u2193";
    show(listed[current]);
  });
  const buttons = { before: () => choose(current - 1), after: () => choose(current + 1) };
  Object.assign(buttons, { "step-before": () => stepBy(-1), "step-after": () => stepBy(1) });
  for (const [id, action] of Object.entries(buttons)) {
    document.getElementById(id).addEventListener("click", action);
  }
  document.addEventListener("keydown", onKey);
  list();
  performance.mark("viewer-usable");
}

startViewer();
