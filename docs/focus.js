// Of the site: what scrolls on its own, a wide table, does so by the keyboard, too.
const focusable = () =>
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((each) => (each.tabIndex = 0));
new MutationObserver(focusable).observe(document.body, { childList: true, subtree: true });
focusable();
