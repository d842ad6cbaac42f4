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

  // Whether the kernel knows every setting that the page shows; see ExplorePanel._know.
  const known = (panel) => {
    const shown = [...panel.querySelectorAll(".dg-form select")].map((select) => select.value);
    return panel.querySelector(".dg-known").textContent.trim() === shown.join(" | ");
  };

  // A busy kernel hears of a press late and a restarted one never, so the page answers first.
  document.addEventListener("click", (event) => {
    const run = event.target.closest?.(".dg-run");
    if (!run) return;
    const panel = run.closest(".dg-panel");
    const status = panel.querySelector(".dg-status .widget-html-content");
    const gone = run.matches(".jupyter-widgets-disconnected");
    if (gone || run.matches(".dg-busy")) event.stopImmediatePropagation();
    if (gone) status.textContent = "The kernel was restarted: run this notebook again from the top.";
    else if (!run.matches(".dg-busy")) {
      status.textContent = "Waiting for the kernel ...";
      run.classList.add("dg-busy"); // the kernel takes it away when the run is done
      if (known(panel)) return;
      event.stopImmediatePropagation();
      new MutationObserver((_changes, observer) => {
        if (!known(panel)) return;
        observer.disconnect();
        run.classList.remove("dg-busy");
        run.click();
      }).observe(panel.querySelector(".dg-known"), { subtree: true, childList: true, characterData: true });
    }
  }, true);

  // The panel keeps all keys, so it needs a way back to the notebook.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") event.target.closest?.(".dg-panel")?.closest(".jp-Cell")?.focus();
  });

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
