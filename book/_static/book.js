// What screen readers, keyboards and narrow windows need of tables and equations; neither pandas nor MyST writes it.
addEventListener("DOMContentLoaded", () => {
  const all = (where, selector) => [...where.querySelectorAll(selector)];

  // Every header cell says what it heads; the empty corner of an index heads nothing. Sentences keep a readable width.
  for (const cell of all(document, ".bd-article :is(th, td)")) {
    const [text, head] = [cell.textContent.trim(), cell.tagName == "TH"];
    cell.classList.toggle("long", text.length > 30);
    if (head && text) {
      const [kind, span] = cell.closest("thead") ? ["col", cell.colSpan] : ["row", cell.rowSpan];
      cell.scope = span > 1 ? kind + "group" : kind;
    } else if (head) {
      const { rowSpan, colSpan } = cell;
      cell.replaceWith(Object.assign(document.createElement("td"), { rowSpan, colSpan }));
    }
  }

  // What is wider than its box scrolls in it: then the box has a name and is a stop of the Tab key.
  const fit = box => {
    const table = box.querySelector(":scope > table"), scrolls = box.scrollWidth > box.clientWidth + 1;
    const attributes = { tabindex: 0, role: "region", "aria-label": box.dataset.name };
    for (const [key, value] of Object.entries(attributes))
      scrolls ? box.setAttribute(key, value) : box.removeAttribute(key);
    box.classList.toggle("scrolls", scrolls);
    if (table) keep(table, box.clientWidth, scrolls);
  };

  // While a table scrolls, its caption and narrow names of rows stay in view.
  const keep = (table, width, scrolls) => {
    if (table.caption) table.caption.style.maxWidth = width + "px";
    const names = all(table, "tbody th");
    names.forEach(cell => cell.classList.remove("stays")); // where a cell is kept, it does not tell where it belongs
    const places = names.map(cell => cell.offsetLeft);
    const stay = scrolls && names.every((cell, i) => places[i] + cell.offsetWidth < 0.6 * width);
    names.forEach((cell, i) => (cell.style.left = places[i] + "px", cell.classList.toggle("stays", stay)));
  };

  const sizes = new ResizeObserver(entries => requestAnimationFrame(() =>
    new Set(entries.map(entry => entry.target.closest("[data-name]"))).forEach(fit)));
  all(document, ".bd-article :is(div:has(> table), div.math)").forEach((box, i) => {
    const said = box.querySelector("caption") || box.closest("section")?.querySelector("h1, h2, h3, h4");
    const kind = box.matches(".math") ? "Equation" : "Table";
    box.dataset.name = `${kind} (${i + 1} on this page): ${said?.firstChild.textContent || document.title}`;
    [box, ...box.children].forEach(element => sizes.observe(element));
  });
});
