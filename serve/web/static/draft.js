// Keeps the address of what was uploaded last for as long as it waits, so that "Make your bot" can offer it again.

const form = document.getElementById("draft");
sessionStorage.setItem("draft", form.action);
form.addEventListener("submit", ({ submitter }) => {
  if (submitter?.formMethod !== "get") sessionStorage.removeItem("draft"); // a job takes it, or it is thrown away
});
