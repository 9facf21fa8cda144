// Has the bot write as one looks on: the form's texts stream into cards, all at once, instead of arriving with a page.

const form = document.getElementById("write");
const stop = document.getElementById("stop");
const cards = document.getElementById("texts");
const said = document.getElementById("write-said");
const wrong = document.getElementById("write-error");
const model = form.dataset.model;
const keptSettings = "rookery write";
const keptTexts = `rookery texts ${model}`; // of this version
const numbers = ["n", "max_tokens", "seed", "temperature", "top_p", "top_k", "repetition_penalty"];
let running = null;

// --- What is asked -------------------------------------------------------------------------------------------

function readForm() {
  const asked = { prompt: form.prompt.value };
  for (const name of numbers) if (form[name].value !== "") asked[name] = Number(form[name].value);
  return asked;
}

// The sampling stays from bot to bot.
function restoreSettings(settings) {
  for (const name of numbers.filter((name) => name in settings)) {
    const before = form[name].value;
    form[name].value = settings[name];
    if (!form[name].validity.valid) form[name].value = before; // more than this bot can
  }
}

// A field that keeps the form from being sent may be folded away, where nobody sees what is wrong with it.
form.addEventListener("invalid", ({ target }) => {
  if (target !== form.querySelector(":invalid")) return; // the first is where the browser leads to
  const folded = target.closest("details");
  if (folded) folded.open = true;
  [wrong.textContent, wrong.hidden] = [`${target.labels[0].textContent}: ${target.validationMessage}`, false];
}, true);

// --- What stays while the window is open ---------------------------------------------------------------------

function keep(name, value) {
  try { sessionStorage.setItem(name, JSON.stringify(value)); } catch { /* a browser that keeps nothing, or no more */ }
}

function recall(name) {
  try { return JSON.parse(sessionStorage.getItem(name)); } catch { return null; }
}

// For whoever comes back to the page: its last texts.
function restoreTexts({ prompt, outcome, texts }) {
  const open = texts.map(() => newCard(prompt));
  open.forEach((one, number) => { one.text.data = texts[number]; });
  cards.replaceChildren(...open.map(({ card }) => card));
  open.forEach(finish);
  [form.prompt.value, said.textContent] = [prompt, outcome];
}

// --- The cards -----------------------------------------------------------------------------------------------

function newCard(prompt) {
  const card = document.getElementById("card-of-text").content.querySelector("article").cloneNode(true);
  const lead = document.createElement("span");
  lead.className = "lead";
  lead.textContent = prompt;
  const text = document.createTextNode("");
  card.querySelector(".said").replaceChildren(lead, text);
  card.classList.add("writing");
  card.querySelector(".actions").inert = true;
  return { card, prompt, text };
}

function finish({ card, prompt, text }) {
  if (!card.classList.contains("writing")) return;
  card.classList.remove("writing");
  card.querySelector(".actions").inert = false;
  const whole = prompt + text.data;
  for (const link of card.querySelectorAll("[data-share]")) link.href = link.dataset.share + encodeURIComponent(whole + cards.dataset.signature);
  const choose = card.querySelector("form");
  if (choose) [choose.prompt.value, choose.text.value] = [prompt, whole];
}

// --- The stream ----------------------------------------------------------------------------------------------

// What the network refuses, in words of ours; all else that goes wrong says itself what it is.
async function reach(promise, sentence) {
  try {
    return await promise;
  } catch (error) {
    throw error instanceof TypeError ? new Error(sentence, { cause: error }) : error;
  }
}

const UNREACHABLE = "The server cannot be reached. Try again.";
const BROKEN_OFF = "The answer broke off before the texts were complete. Try again.";

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reach(reader.read(), BROKEN_OFF);
    if (done) throw new Error(BROKEN_OFF);
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  }
}

async function stream(asked, open, signal) {
  const answer = await reach(fetch("/v1/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model, stream: true, add_bos: true, ...asked }),
    signal,
  }), UNREACHABLE);
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Error(body?.error?.message ?? `The server answered with ${answer.status}. Try again.`);
  }
  for await (const event of readEvents(answer.body)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      open[choice.index].text.data += choice.text;
      if (choice.finish_reason) finish(open[choice.index]);
    }
  }
}

async function write() {
  running?.abort();
  const mine = running = new AbortController();
  const asked = readForm();
  asked.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  const { prompt, seed, ...settings } = asked;
  keep(keptSettings, settings);
  const open = Array.from({ length: asked.n }, () => newCard(prompt));
  cards.replaceChildren(...open.map(({ card }) => card));
  cards.setAttribute("aria-busy", "true");
  [wrong.hidden, stop.hidden, said.textContent] = [true, false, "Writing …"];
  let outcome = "";
  try {
    await stream(asked, open, mine.signal);
    outcome = `${asked.n} ${asked.n === 1 ? "text" : "texts"}, with the seed ${seed}: the same seed gives the same texts again.`;
  } catch (error) {
    if (mine !== running) return; // the next has begun
    if (mine.signal.aborted) outcome = `Stopped; the seed was ${seed}.`;
    else [wrong.textContent, wrong.hidden] = [error.message, false];
    for (const one of open) if (!one.text.data) one.card.remove();
  }
  if (mine !== running) return;
  open.forEach(finish);
  const texts = open.map(({ text }) => text.data).filter(Boolean);
  if (texts.length) keep(keptTexts, { prompt, outcome, texts });
  cards.removeAttribute("aria-busy");
  if (document.activeElement === stop) form.querySelector("button").focus();
  [stop.hidden, said.textContent] = [true, outcome];
}

form.addEventListener("submit", (event) => { event.preventDefault(); write(); });
stop.addEventListener("click", () => running?.abort());
if (!cards.childElementCount && wrong.hidden) { // else the page came with what was just asked
  restoreSettings(recall(keptSettings) ?? {});
  const last = recall(keptTexts);
  if (last) restoreTexts(last);
}

// --- The text that stands for the bot ------------------------------------------------------------------------

// As the form would, but the texts stay on the page: only the picture is taken over from the page that answers.
cards.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.submitter, before = button.textContent;
  if (button.ariaBusy) return;
  button.ariaBusy = "true"; // not `disabled`, which would take the keyboard away from it
  try {
    const answer = await reach(fetch(event.target.action, { method: "POST", body: new URLSearchParams(new FormData(event.target)) }), UNREACHABLE);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!answer.ok) throw new Error(page.querySelector(".notice.bad")?.textContent ?? "The server refused.");
    const [old, now] = [document, page].map((from) => from.getElementById("picture"));
    if (!old || !now) return location.assign(answer.url);
    old.replaceWith(now);
    [said.textContent, button.textContent] = [page.querySelector(".notice.good")?.textContent ?? "", "It is the preview"];
    setTimeout(() => { button.textContent = before; }, 3000);
  } catch (error) {
    [wrong.textContent, wrong.hidden] = [error.message, false];
  }
  button.ariaBusy = null;
});
