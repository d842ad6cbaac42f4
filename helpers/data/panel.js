(() => {
  if (document.documentElement.classList.contains("dg-script")) return;
  document.documentElement.classList.add("dg-script"); // shows the copy buttons

  document.addEventListener("focusin", ({ target }) => {
    const own = target.closest?.(".dg-panel, .dg-outcome");
    if (!own) return;
    // In command mode JupyterLab takes arrows and letters from a focused control, unless the
    // control itself (not an ancestor) says so; ipywidgets says so on none.
    target.setAttribute("data-lm-suppress-shortcuts", "true");
  });

  // What ipywidgets cannot say of its widgets. It draws a panel in pieces, and again when the cell
  // has moved; the text of a live region is spoken when it changes, not when it is new on the page.
  const prepare = (panel) => {
    const [status, hint, area, run, known] = ["status", "hint", "form textarea", "run", "known span"]
      .map((name) => panel.querySelector(`.dg-${name}`));
    status?.setAttribute("role", "status");
    if (known?.dataset.lang) panel.lang = known.dataset.lang;
    if (hint && area) {
      hint.id ||= `dg-hint-${area.id}`;
      area.setAttribute("aria-describedby", hint.id);
    }
    if (run && !run.hasAttribute("aria-disabled")) {
      const follow = () => run.setAttribute("aria-disabled", run.classList.contains("dg-busy"));
      new MutationObserver(follow).observe(run, { attributeFilter: ["class"] });
      follow();
    }
  };
  const drawn = () => document.querySelectorAll(".dg-panel").forEach(prepare);
  new MutationObserver(drawn).observe(document.body, { subtree: true, childList: true });
  drawn();

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
  // of a character may be in it. As _ends() of the doctor's panel.
  document.addEventListener("input", ({ target }) => {
    const panel = target.closest?.(".dg-panel");
    if (!panel || !target.matches("textarea")) return;
    const { most, half, gap, cut } = words(panel);
    const { value } = target;
    const is_long = value.length > most;
    const ends = is_long ? `${value.slice(0, half)}\n${gap}\n${value.slice(-half)}` : value;
    const whole = ends.toWellFormed?.() ?? ends;
    if (whole !== value) target.value = whole;
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

  // A panel and a card keep all keys, so they need a way back to the notebook.
  document.addEventListener("keydown", (event) => {
    const own = event.key === "Escape" && event.target.closest?.(".dg-panel, .dg-outcome");
    if (own) own.closest(".jp-Cell")?.focus();
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
