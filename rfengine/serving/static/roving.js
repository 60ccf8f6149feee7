/** One place in the tab order for a whole group of buttons; arrow keys move within it. */

const STEPS = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };

/** Let the arrow keys, Home and End move the focus among the buttons of a group. */
export function moveWithArrows(/** @type {HTMLElement} */ group) {
  group.addEventListener("keydown", (event) => {
    const buttons = [...group.querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    let next = at + (STEPS[event.key] ?? 0);
    if (event.key === "Home") next = 0;
    if (event.key === "End") next = buttons.length - 1;
    if (at < 0 || next === at) return;
    event.preventDefault();
    buttons[Math.max(0, Math.min(next, buttons.length - 1))].focus();
  });
  group.addEventListener("focusin", ({ target }) => {
    if (target instanceof HTMLButtonElement) makeTabStop(group, target);
  });
}

/** The button of a group that the tab key comes to. */
export function makeTabStop(/** @type {HTMLElement} */ group, /** @type {HTMLButtonElement} */ button) {
  for (const other of group.querySelectorAll("button[tabindex='0']")) other.tabIndex = -1;
  button.tabIndex = 0;
}
