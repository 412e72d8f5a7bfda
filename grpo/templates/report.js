"use strict";
// Two things only: values under the pointer, and one group at a time. Text of a model enters through textContent.
const data = JSON.parse(document.getElementById("data").textContent);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function show(value, unit) {
  if (value === null) return "–";
  if (unit === "%") return (100 * value).toFixed(1) + "%";
  const size = Math.abs(value);
  const small = size > 0 && size < 1e-3;
  return small ? value.toExponential(1) : value.toLocaleString("en", { maximumSignificantDigits: size < 1000 ? 3 : 4 });
}

for (const figure of document.querySelectorAll("figure[data-curve]")) {
  const { unit, lines } = data.curves[figure.dataset.curve];
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const describe = (at) => lines
    .map((line) => (lines.length > 1 ? line.label + " " : "") + show(line.values[at], unit)).join(" · ");
  const rest = () => {
    const last = lines[0].values.findLastIndex((value) => value !== null);
    cursor.setAttribute("visibility", "hidden");
    readout.textContent = "last " + describe(last);
  };
  const follow = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let at = 0;
    data.buckets.forEach((bucket, i) => { if (Math.abs(bucket[0] - x) < Math.abs(data.buckets[at][0] - x)) at = i; });
    const [place, first, last] = data.buckets[at];
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.setAttribute("visibility", "visible");
    const steps = first === last ? "step " + first : "mean of steps " + first + "–" + last;
    readout.textContent = steps + ": " + describe(at);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", rest);
  rest();
}

function mark(text) {
  const box = make("div", "text");
  const parts = text.split(/(<\/?think>|<answer>[^]*?<\/answer>|<\/?answer>)/);
  for (const part of parts) {
    const answer = /^<answer>([^]*)<\/answer>$/.exec(part);
    if (answer) box.append(make("span", "tag", "<answer>"), make("span", "answer", answer[1]), make("span", "tag", "</answer>"));
    else box.append(/^<\/?(think|answer)>$/.test(part) ? make("span", "tag", part) : part);
  }
  return box;
}

function renderCompletion(completion, largest) {
  const row = make("div", "completion");
  const side = make("div", "verdicts");
  const line = (label, value, className) => {
    const entry = make("div", className);
    entry.append(make("span", "", label), make("b", "", value));
    side.append(entry);
    return entry;
  };
  const advantage = completion.advantage;
  const entry = line("advantage", advantage === null ? "–" : (advantage > 0 ? "+" : "") + advantage.toFixed(2), "advantage");
  if (advantage && largest) {
    const strength = Math.round(8 + 30 * Math.abs(advantage) / largest);
    entry.style.background = `color-mix(in srgb, var(--${advantage > 0 ? "good" : "bad"}) ${strength}%, transparent)`;
  }
  line("reward", show(completion.reward, ""));
  for (const [name, score] of Object.entries(completion.breakdown)) line(name, show(score, ""));
  line("tokens", show(completion.num_tokens, ""));
  if (completion.finish_reason) line("finish", completion.finish_reason);
  if (completion.status && completion.status !== "ok") line("status", completion.status).lastChild.className = "status";
  if (completion.detail) side.append(make("div", "detail", completion.detail));
  row.append(side, completion.text ? mark(completion.text) : make("div", "muted", "(empty)"));
  return row;
}

function renderGroup(group) {
  const prompt = make("div", "prompt");
  prompt.append(make("div", "text", group.prompt));
  const about = make("div", "about");
  for (const [label, value] of [["answer", group.answer], ["id", group.id], ["source", group.source]]) {
    if (!value) continue;
    const entry = make("span", "", label + " ");
    entry.append(make("b", "", value));
    about.append(entry);
  }
  prompt.append(about);
  if (group.prompt_text) {
    const details = make("details");
    details.append(make("summary", "", "Prompt as the model saw it"), make("pre", "", group.prompt_text));
    prompt.append(details);
  }
  const largest = Math.max(0, ...group.completions.map((completion) => Math.abs(completion.advantage ?? 0)));
  const rows = group.completions.map((completion) => renderCompletion(completion, largest));
  document.getElementById("group").replaceChildren(prompt, ...rows);
  if (group.left_out) document.getElementById("group").append(make("p", "note", `${group.left_out} more completions are in the run folder.`));
}

if (data.groups.length) {
  const [step, problem, previous, next] = ["step", "problem", "previous", "next"].map((id) => document.getElementById(id));
  const option = (value, text) => { const entry = make("option", "", text); entry.value = value; return entry; };
  const summarise = (group) => {
    const rewards = group.completions.map((completion) => completion.reward).filter((reward) => reward !== null);
    const mean = rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : null;
    const title = group.id || group.prompt.trim().split("\n")[0];
    return `${title.slice(0, 60)} · mean reward ${show(mean, "")}`;
  };
  const pick = (at) => {
    const now = data.groups[at].step;
    step.value = now;
    const siblings = data.groups.map((group, i) => [group, i]).filter(([group]) => group.step === now);
    problem.replaceChildren(...siblings.map(([group, i]) => option(i, summarise(group))));
    problem.value = at;
    previous.disabled = at === 0;
    next.disabled = at === data.groups.length - 1;
    renderGroup(data.groups[at]);
  };
  step.append(...[...new Set(data.groups.map((group) => group.step))].map((number) => option(number, number)));
  step.addEventListener("change", () => pick(data.groups.findIndex((group) => group.step === Number(step.value))));
  problem.addEventListener("change", () => pick(Number(problem.value)));
  previous.addEventListener("click", () => pick(Number(problem.value) - 1));
  next.addEventListener("click", () => pick(Number(problem.value) + 1));
  pick(data.groups.length - 1);
}
