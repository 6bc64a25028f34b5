// The check-up: its part of the page is fetched again while one runs. On the overview and on a project's page.
"use strict";

{
  const EVERY_MS = 1000;
  const section = () => document.getElementById("doctor");
  let polling = false;

  const tell = (sentence) => (section().querySelector("[data-said]").textContent = sentence);

  async function show() {
    const next = (await fetchPage(section().dataset.address)).getElementById("doctor");
    if (differs(section(), next)) exchange(section(), next); // admin.js: keeps the keyboard's place
  }

  // A status region outside of the section: one that is replaced is not read out.
  function announce() {
    const words = section().dataset.state === "running" ? "Checking" : "The check-up is over";
    setText("doctor-announce", words);
  }

  async function follow() {
    if (polling) return;
    polling = true;
    try {
      while (section().dataset.state === "running") {
        announce();
        await new Promise((done) => setTimeout(done, EVERY_MS));
        if (document.hidden) continue;
        await show().then(() => tell(""), (error) => tell(error.message)); // the backend may be starting again
      }
      announce();
    } finally {
      polling = false;
    }
  }

  const start = async (path, body) => answer(await send("POST", section().dataset.api + path, body));

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button[data-doctor]");
    if (!button) return;
    tell("");
    button.disabled = true;
    try {
      if (button.dataset.doctor === "run") await start("");
      else await start("/fix", { name: button.dataset.name, of_project: Boolean(button.dataset.ofProject) });
      section().dataset.state = "running"; // followed even if the next answer does not come
      await show().catch((error) => tell(error.message));
      await follow();
      const again = section().querySelector('[data-doctor="run"]');
      if (document.activeElement === document.body) again.focus({ preventScroll: true }); // it was disabled meanwhile
    } catch (error) {
      button.disabled = false;
      tell(error.message);
    }
  });

  if (section()?.dataset.state === "running") follow();
}
