// Keeps the parts of a page that change up to date: fetches the page itself again and takes over every element with
// `data-live` (milliseconds until the next time) whose markup has changed. Ends when the page no longer has one.

const parts = () => [...document.querySelectorAll("[data-live][id]")];
const shown = new Map(parts().map((part) => [part.id, part.outerHTML])); // as they came: opening changes the markup

async function refresh() {
  const answer = await fetch(location.href, { headers: { accept: "text/html" }, cache: "no-store" });
  if (answer.redirected) return location.assign(answer.url);
  if (!answer.ok) return;
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
}

async function keepLive() {
  for (;;) {
    const waits = parts().map((part) => Number(part.dataset.live) || 2000);
    if (!waits.length) return;
    await new Promise((done) => setTimeout(done, Math.min(...waits)));
    if (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
    try { await refresh(); } catch { /* the server restarts, or the network is gone: try again */ }
  }
}

keepLive();
