"use strict";
// Texts of prompts and answers reach the page through textContent alone: they are never markup.

const WAYS = {
  compare: [
    { choice: "a", name: "A is better", keys: ["arrowleft", "a", "1"], shown: ["←", "A", "1"] },
    { choice: "tie", name: "Tie", keys: ["t", "0", "="], shown: ["T", "0"] },
    { choice: "b", name: "B is better", keys: ["arrowright", "b", "2"], shown: ["→", "B", "2"] },
    { choice: "skip", name: "Skip", keys: ["s"], shown: ["S"] },
  ],
  rate: [
    { choice: "bad", name: "Bad", keys: ["arrowleft", "b", "0"], shown: ["←", "B", "0"] },
    { choice: "good", name: "Good", keys: ["arrowright", "g", "1"], shown: ["→", "G", "1"] },
    { choice: "skip", name: "Skip", keys: ["s"], shown: ["S"] },
  ],
};
const MAX_WORDS = 2000; // of an answer, for its differences to be marked
const POLL_MS = 5000;

const token = location.hash.slice(1);
const find = (id) => document.getElementById(id);
let state = null;
let busy = false;
let shownAt = 0;
let marking = false;

function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

async function ask(path, data) {
  const headers = { "X-Label-Token": token };
  if (data) headers["Content-Type"] = "application/json";
  const body = data ? JSON.stringify(data) : undefined;
  const answer = await fetch(path, { method: data ? "POST" : "GET", headers, body });
  return answer.json();
}

// Where things stand comes from the server alone, after what it did is on its disk.
async function go(path, data, said) {
  if (busy) return;
  busy = true;
  try {
    const answer = await ask(path, data);
    complain(answer.problem);
    if (answer.state) show(answer.state);
    if (said && !answer.problem) say(said);
  } catch {
    const lost = data ? "The last key was not confirmed. " : "";
    complain(`${lost}The server of this page does not answer. Start the command again and open the address that it prints: every confirmed verdict is safe.`);
  } finally {
    busy = false;
  }
}

function complain(problem) {
  find("problem").hidden = !problem;
  find("problem").textContent = problem || "";
}

function say(text) {
  const { done, total } = state;
  find("said").textContent = `${text} ${done} of ${total}.`;
}

function show(next) {
  const before = state && state.task && state.task.id;
  state = next;
  const task = state.task;
  document.title = `${state.done}/${state.total} · ${state.annotator}`;
  find("who").textContent = state.annotator;
  find("batch").textContent = state.batch;
  find("bar").max = Math.max(state.total, 1);
  find("bar").value = state.done;
  find("count").textContent = state.total ? `${state.done} of ${state.total}` : "";
  find("undo").disabled = !state.can_undo;
  find("differences").hidden = state.ask !== "compare" || !task;
  find("rubric-text").textContent = state.rubric || "No rubric was given: judge by what the prompt asks for.";
  find("main").hidden = find("verdicts").hidden = !task;
  find("idle").hidden = Boolean(task);
  if (!task) return rest();
  if (task.id === before) return;
  showPrompt(task);
  showAnswers(task);
  showVerdicts();
  document.body.dataset.task = task.id;
  shownAt = performance.now();
  scrollTo(0, 0);
}

function rest() {
  delete document.body.dataset.task;
  const { done, total, others } = state;
  const title = total ? "All done. Thank you." : "Nothing to label yet.";
  const rest = others
    ? `Your ${done} verdicts are saved. Other annotators still have ${others} to give.`
    : `Your ${done} verdicts are saved. The campaign has all it asked for and can go on.`;
  find("idle-title").textContent = title;
  find("idle-text").textContent = total ? rest : "This page looks again by itself.";
}

function showPrompt(task) {
  const single = task.messages.length === 1;
  const parts = task.messages.flatMap((message) => {
    const text = element("p", message.text, "text");
    text.dir = "auto";
    return single ? [text] : [element("p", message.role, "role"), text];
  });
  find("prompt").replaceChildren(...parts);
  find("prompt").scrollTop = 0;
  find("note").textContent = task.rubric;
  find("note").hidden = !task.rubric;
}

function showAnswers(task) {
  const unlike = marking && task.answers.length === 2 ? differences(task.answers) : null;
  const cards = task.answers.map((answer, index) => {
    const card = element("article");
    const text = element("div", undefined, "text");
    text.dir = "auto";
    if (unlike) text.append(...unlike[index]);
    else text.textContent = answer.text;
    if (task.answers.length === 2) card.append(element("h2", "AB"[index]));
    card.append(text);
    if (answer.cut_off) card.append(element("p", "cut off at the length limit", "cut"));
    return card;
  });
  find("answers").className = cards.length === 1 ? "single" : "";
  find("answers").replaceChildren(...cards);
}

function showVerdicts() {
  const buttons = WAYS[state.ask].map((way) => {
    const button = element("button", way.name, way.choice === "skip" ? "last" : "");
    button.type = "button";
    button.append(element("kbd", way.shown[0]));
    button.addEventListener("click", () => give(way.choice, way.name));
    return button;
  });
  find("verdicts").replaceChildren(...buttons);
  const rows = [
    ...WAYS[state.ask].map((way) => [way.shown, way.name]),
    [["U", "⌫"], "Take the last verdict back"],
    ...(state.ask === "compare" ? [[["D"], "Mark the words that differ"]] : []),
    [["R", "?"], "This panel"],
  ];
  const parts = rows.flatMap(([keys, name]) => {
    const term = element("dt");
    term.append(...keys.map((key) => element("kbd", key)));
    return [term, element("dd", name)];
  });
  find("keys").replaceChildren(...parts);
}

function give(choice, name) {
  if (!state || !state.task) return;
  const seconds = (performance.now() - shownAt) / 1000;
  go("/api/verdict", { task: state.task.id, choice, seconds }, `Saved: ${name}.`);
}

function undo() {
  if (state && state.can_undo) go("/api/undo", {}, "Taken back.");
}

function toggleDifferences() {
  if (!state || !state.task || state.ask !== "compare") return;
  marking = !marking;
  find("differences").setAttribute("aria-pressed", String(marking));
  showAnswers(state.task);
}

function toggleRubric() {
  const panel = find("rubric-panel");
  if (panel.open) panel.close();
  else panel.showModal();
}

// The words of each answer that are not in the longest common sequence of both, marked.
function differences(answers) {
  const [a, b] = answers.map((answer) => answer.text.split(/(\s+)/).filter(Boolean));
  if (a.length > MAX_WORDS || b.length > MAX_WORDS) return null;
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const at = i * width + j;
      longest[at] = a[i] === b[j]
        ? longest[at + width + 1] + 1
        : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  const sides = [[], []];
  const put = (side, word, marked) => sides[side].push(element(marked && word.trim() ? "mark" : "span", word));
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      put(0, a[i++], false);
      put(1, b[j++], false);
    } else if (j === b.length || (i < a.length && longest[(i + 1) * width + j] >= longest[i * width + j + 1])) {
      put(0, a[i++], true);
    } else {
      put(1, b[j++], true);
    }
  }
  return sides;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  if (key === "r" || key === "?") {
    event.preventDefault();
    return toggleRubric();
  }
  if (find("rubric-panel").open || !state) return;
  const way = WAYS[state.ask].find((entry) => entry.keys.includes(key));
  const action = way ? () => give(way.choice, way.name) : { u: undo, backspace: undo, d: toggleDifferences }[key];
  if (!action) return;
  event.preventDefault();
  action();
}

document.addEventListener("keydown", onKey);
find("undo").addEventListener("click", undo);
find("differences").addEventListener("click", toggleDifferences);
find("rubric").addEventListener("click", toggleRubric);
setInterval(() => {
  if (!state || !state.task) go("/api/state");
}, POLL_MS);
go("/api/state");
