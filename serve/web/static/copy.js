// Buttons with `data-copy`: the id of what they copy, or nothing for the text of their own card.

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // over plain HTTP browsers have the old way only
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const from = button.dataset.copy ? document.getElementById(button.dataset.copy) : button.closest("article").querySelector(".said");
  await copy(from.textContent);
  const name = button.firstChild, before = name.data;
  if (before === "Copied") return;
  name.data = "Copied";
  button.focus();
  setTimeout(() => { name.data = before; }, 2000);
});
