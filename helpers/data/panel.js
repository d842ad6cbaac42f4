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
    const hint = own.querySelector(".dg-hint");
    if (hint && target.matches("textarea")) {
      hint.id ||= `dg-hint-${target.id}`;
      target.setAttribute("aria-describedby", hint.id);
    }
    if (target.matches(".dg-run:not([aria-disabled])")) {
      const follow = () => target.setAttribute("aria-disabled", target.classList.contains("dg-busy"));
      new MutationObserver(follow).observe(target, { attributeFilter: ["class"] });
      follow();
    }
  });

  // Adler-32 of a text in UTF-16, as digest() of style.py.
  const digest = (text) => {
    let low = 1, high = 0;
    for (let i = 0; i < text.length; i++) {
      const unit = text.charCodeAt(i);
      for (const byte of [unit & 255, unit >> 8]) {
        low = (low + byte) % 65521;
        high = (high + low) % 65521;
      }
    }
    return String(high * 65536 + low);
  };

  // Whether the kernel knows every setting that the page shows; see ExplorePanel._know.
  const known = (panel) => {
    const controls = [...panel.querySelectorAll(".dg-form :is(select, textarea)")];
    const shown = controls.map((one) => one.matches("select") ? one.value : digest(one.value));
    return panel.querySelector(".dg-known").textContent.trim() === shown.join(" | ");
  };
  const words = (panel) => ({
    waiting: "Waiting for the kernel ...",
    gone: "The kernel was restarted: run this notebook again from the top.",
    copied: "Copied.",
    refused: "The browser refused: select the lines and copy them.",
    ...panel?.querySelector(".dg-known span")?.dataset,
  });
  const status = (panel) => panel.querySelector(".dg-status .widget-html-content");

  // A message to the kernel has a largest size, beyond which the connection breaks, and no halves
  // of a character may be in it. What went wrong stands at the end of a log.
  document.addEventListener("input", ({ target }) => {
    const panel = target.closest?.(".dg-panel");
    if (!panel || !target.matches("textarea")) return;
    const { most, cut } = words(panel);
    const is_long = target.value.length > most;
    const end = is_long ? target.value.slice(-most) : target.value;
    const whole = end.toWellFormed?.() ?? end;
    if (whole !== target.value) target.value = whole;
    if (is_long) status(panel).textContent = cut;
  }, true);

  // A busy kernel hears of a press late and a restarted one never, so the page answers first.
  document.addEventListener("click", (event) => {
    const run = event.target.closest?.(".dg-run");
    if (!run) return;
    const panel = run.closest(".dg-panel");
    const gone = run.matches(".jupyter-widgets-disconnected");
    if (gone || run.matches(".dg-busy")) event.stopImmediatePropagation();
    if (gone) status(panel).textContent = words(panel).gone;
    else if (!run.matches(".dg-busy")) {
      status(panel).textContent = words(panel).waiting;
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
    const { copied, refused } = words(button.closest(".dg-panel"));
    const say = (words) => { box.querySelector(".dg-copied").textContent = words; };
    copy(box.querySelector("code").textContent)
      .then(() => say(copied), () => say(refused))
      .finally(() => button.focus());
  });
})();
