// Sends the form of "Make your bot" with progress. A refusal is shown in place, and what was chosen stays chosen.

const form = document.getElementById("upload");
const inputs = [...form.querySelectorAll("input[type=file]")];
const [error, begin, sending, phase, bar, facts, stop] = ["error", "begin", "sending", "sending-phase", "sending-bar", "sending-facts", "stop"]
  .map((id) => document.getElementById(id));

const size = (bytes) => bytes >= 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${Math.ceil(bytes / 1e3)} kB`;
const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.round(seconds) % 60).padStart(2, "0")}`;

function complain(text) {
  error.replaceChildren();
  if (!text) return;
  const notice = document.createElement("p");
  notice.className = "notice bad";
  notice.dir = "auto";
  notice.setAttribute("role", "alert");
  notice.textContent = text;
  error.append(notice);
  notice.scrollIntoView({ block: "nearest" });
}

function showSending(is) {
  sending.hidden = !is;
  begin.hidden = is;
}

// --- Sending ----------------------------------------------------------------------------------------------

function send() {
  const request = new XMLHttpRequest();
  const started = performance.now();
  const say = (text) => { if (phase.textContent !== text) phase.textContent = text; };
  request.upload.addEventListener("progress", ({ loaded, total }) => {
    const speed = loaded / Math.max((performance.now() - started) / 1e3, .001);
    bar.value = 100 * loaded / total;
    facts.textContent = `${size(loaded)} of ${size(total)} (${Math.floor(100 * loaded / total)} %), ${size(speed)}/s, ${clock((total - loaded) / speed)} left`;
  });
  request.upload.addEventListener("load", () => {
    say("Reading the archive …");
    bar.removeAttribute("value");
    facts.textContent = "";
  });
  request.addEventListener("load", () => {
    const page = new DOMParser().parseFromString(request.responseText, "text/html");
    if (request.status < 400) return location.assign(request.responseURL);
    showSending(false);
    complain(page.querySelector("main .notice.bad")?.textContent || `The server answered ${request.status}. Try again.`);
  });
  request.addEventListener("error", () => {
    showSending(false);
    complain("The upload broke off: the server cannot be reached, or refused a file of this size. Try again.");
  });
  request.addEventListener("abort", () => { showSending(false); begin.querySelector("button").focus(); });
  stop.onclick = () => request.abort();

  complain("");
  showSending(true);
  say("Uploading …");
  bar.value = 0;
  facts.textContent = "";
  stop.focus();
  request.open("POST", form.action);
  request.setRequestHeader("accept", "text/html");
  request.send(new FormData(form));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const total = inputs.reduce((sum, input) => sum + (input.files[0]?.size ?? 0), 0);
  if (total > Number(form.dataset.limit)) {
    return complain(`That is ${size(total)}, and at most ${size(Number(form.dataset.limit))} are taken here. Of X’s archive only the file data/tweets.js is needed: unpack the archive, drop that file alone, and write the handle beside it.`);
  }
  send();
});

// --- An archive that waits ----------------------------------------------------------------------------------

async function offerDraft() {
  const address = sessionStorage.getItem("draft");
  if (!address) return;
  const answer = await fetch(address, { method: "HEAD", cache: "no-store" });
  if (answer.redirected) return; // to sign in first
  if (!answer.ok) return sessionStorage.removeItem("draft");
  document.getElementById("waiting-draft").href = address;
  document.getElementById("waiting").hidden = false;
}

offerDraft().catch(() => { /* it is not offered */ });

// --- Dropping ---------------------------------------------------------------------------------------------

for (const input of inputs) {
  const zone = input.closest(".drop");
  input.addEventListener("change", () => { complain(""); zone.classList.toggle("full", input.files.length > 0); });
  zone.classList.toggle("full", input.files.length > 0); // after going back
  for (const kind of ["dragenter", "dragover"]) zone.addEventListener(kind, () => zone.classList.add("over"));
  for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, () => zone.classList.remove("over"));
}

const put = (input, file) => {
  const one = new DataTransfer();
  one.items.add(file);
  input.files = one.files;
  for (let fold = input.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  input.dispatchEvent(new Event("change"));
};

// A zone by itself takes no more than one file, and one dropped beside it would replace the page. Here several fill one
// zone after another from where they were dropped; beside all zones that is the first that is visible and empty.
document.addEventListener("dragover", (event) => {
  if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  const files = [...event.dataTransfer?.files ?? []];
  if (!files.length) return;
  event.preventDefault();
  const hit = event.target.closest(".drop")?.querySelector("input");
  const first = hit ?? inputs.find((input) => input.checkVisibility() && !input.files.length) ?? inputs[0];
  const slots = inputs.slice(inputs.indexOf(first));
  if (files.length > slots.length) {
    const room = slots.length < inputs.length ? `, and from here on there is room for ${slots.length}` : "";
    return complain(`A bot is made of at most ${inputs.length} archives, one a person${room}. You dropped ${files.length}: none was taken.`);
  }
  files.forEach((file, number) => put(slots[number], file));
});
