(() => {
  if (document.documentElement.classList.contains("dg-script")) return;
  document.documentElement.classList.add("dg-script"); // shows the copy buttons

  document.addEventListener("focusin", ({ target }) => {
    const own = target.closest?.(".dg-panel, .dg-outcome");
    if (!own) return;
    // In command mode JupyterLab takes arrows and letters from a focused control, unless the
    // control itself (not an ancestor) says so; ipywidgets says so on none.
    target.setAttribute("data-lm-suppress-shortcuts", "true");
    // The text of a live region is spoken when it changes; one that is new on the page is not.
    own.querySelector(".dg-status")?.setAttribute("role", "status");
    if (target.matches(".dg-run:not([aria-disabled])")) {
      const follow = () => target.setAttribute("aria-disabled", target.classList.contains("dg-busy"));
      new MutationObserver(follow).observe(target, { attributeFilter: ["class"] });
      follow();
    }
  });

  const wait = (event) => event.target.closest?.(".dg-run.dg-busy") && event.stopImmediatePropagation();
  document.addEventListener("click", wait, true);

  const copy = async (text) => {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const area = document.createElement("textarea"); // plain http has no clipboard interface
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error("copy refused");
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".dg-copy");
    if (!button) return;
    const box = button.closest(".dg-snippet");
    const say = (words) => { box.querySelector(".dg-copied").textContent = words; };
    copy(box.querySelector("code").textContent)
      .then(() => say("Copied."), () => say("The browser refused: select the lines and copy them."))
      .finally(() => button.focus());
  });
})();
