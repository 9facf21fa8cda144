// Keeps the parts of a page that change up to date: fetches the page itself again and takes over every element with
// `data-live` (milliseconds until the next time) whose markup has changed. Ends when the page no longer has one, or is gone.

const parts = () => [...document.querySelectorAll("[data-live][id]")];
const LONGEST_MS = 30_000; // between two attempts while the server does not answer
const shown = new Map(parts().map((part) => [part.id, part.outerHTML])); // as they came: opening changes the markup

// Whether there is something to wait for still. Throws when this attempt failed.
async function refresh() {
  const answer = await fetch(location.href, { headers: { accept: "text/html" }, cache: "no-store" });
  if (answer.redirected) { location.assign(answer.url); return false; }
  if (answer.status === 404 || answer.status === 410) { location.reload(); return false; } // the server says it better
  if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const old of parts()) {
    const now = fresh.getElementById(old.id);
    if (!now || now.outerHTML === shown.get(old.id)) continue;
    // What is being used stays: whoever types must not lose it; the focus goes on to what has the same id.
    const focused = old.contains(document.activeElement) ? document.activeElement : null;
    const heir = focused?.id && !focused.matches("input, textarea, select") && now.querySelector(`#${CSS.escape(focused.id)}`);
    if (focused && !heir && now.hasAttribute("data-live")) continue;
    shown.set(old.id, now.outerHTML);
    for (const open of old.querySelectorAll("details[open][id]")) now.querySelector(`#${CSS.escape(open.id)}`)?.setAttribute("open", "");
    old.replaceWith(now);
    if (heir) heir.focus({ preventScroll: true });
  }
  document.title = fresh.title;
  return parts().length > 0;
}

async function keepLive() {
  let numFailures = 0;
  for (let goesOn = parts().length > 0; goesOn;) {
    const wait = Math.min(...parts().map((part) => Number(part.dataset.live) || 2000)) * 2 ** numFailures;
    await new Promise((done) => setTimeout(done, numFailures ? Math.min(wait, LONGEST_MS) : wait));
    if (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
    try {
      goesOn = await refresh();
      numFailures = 0;
    } catch { // the server restarts, or the network is gone
      numFailures += 1;
    }
  }
}

keepLive();
