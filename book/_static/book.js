// What screen readers, keyboards and narrow windows need of tables and equations; neither pandas nor MyST writes it.
addEventListener("DOMContentLoaded", () => {
  const all = (where, selector) => [...where.querySelectorAll(selector)];
  const textOf = cell => cell.textContent.trim();

  // docutils makes a list of the references, of no items.
  all(document, ".citation-list > .citation").forEach(entry => entry.setAttribute("role", "listitem"));

  // pandas gives the names of an index a line of their own in the head: they fit into the one above.
  for (const head of all(document, ".bd-article thead")) {
    const [names, columns] = [...head.rows].reverse().map(row => [...row.cells]);
    const fits = columns?.length == names?.length && names.every((cell, i) => !textOf(cell) || !textOf(columns[i]));
    if (!fits || !names.some(textOf)) continue;
    names.forEach((cell, i) => textOf(cell) && columns[i].replaceWith(cell));
    head.rows[head.rows.length - 1].remove();
  }

  // Every header cell says what it heads; the empty corner of an index heads nothing. Sentences keep a readable width.
  for (const cell of all(document, ".bd-article :is(th, td)")) {
    const [text, head] = [textOf(cell), cell.tagName == "TH"];
    cell.classList.toggle("long", text.length > 30);
    if (head && text) {
      const [kind, span] = cell.closest("thead") ? ["col", cell.colSpan] : ["row", cell.rowSpan];
      cell.scope = span > 1 ? kind + "group" : kind;
    } else if (head) {
      const { rowSpan, colSpan } = cell;
      cell.replaceWith(Object.assign(document.createElement("td"), { rowSpan, colSpan }));
    }
  }

  // A column of numbers, with intervals or without, is set flush right. Names of rows may span several rows: columns
  // are counted from the right.
  const number = /^[<>≤≥~]?\s*[-+−]?\d[\d,.\s]*(e[-+−]?\d+)?\s*%?(\s*\[.*\]|\s*±.*)?$/i;
  const missing = /^([-–—]|\.{3}|nan|none|undefined|diverged)?$/i;
  for (const table of all(document, ".bd-article table")) {
    const rows = all(table, "tbody tr").map(row => [...row.cells].reverse());
    const heads = [...table.tHead?.rows ?? []].slice(-1).flatMap(row => [...row.cells].reverse());
    for (let i = 0; i < Math.max(0, ...rows.map(row => row.length)); i++) {
      const cells = rows.map(row => row[i]).filter(cell => cell?.tagName == "TD" && cell.colSpan == 1);
      const texts = cells.map(textOf).filter(text => !missing.test(text));
      if (texts.length && texts.every(text => number.test(text)))
        [...cells, heads[i]].forEach(cell => cell?.classList.add("number"));
    }
  }

  // What is wider than its box scrolls in it: then the box has a name and is a stop of the Tab key.
  const fit = box => {
    const table = box.querySelector(":scope > table"), scrolls = box.scrollWidth > box.clientWidth + 1;
    const attributes = { tabindex: 0, role: "region", "aria-label": box.dataset.name };
    for (const [key, value] of Object.entries(attributes))
      scrolls ? box.setAttribute(key, value) : box.removeAttribute(key);
    box.classList.toggle("scrolls", scrolls);
    box.classList.toggle("fits", Boolean(table) && !scrolls);
    if (table) keep(table, box.clientWidth, scrolls);
  };

  // While a table scrolls, its caption and what names its rows stay in view, if that is narrow.
  const keep = (table, width, scrolls) => {
    if (table.caption) table.caption.style.maxWidth = width + "px";
    const names = all(table, "tbody th").length ? all(table, "tbody th") : all(table, "tbody td:first-child");
    const cells = [...names, ...all(table, "thead :is(th, td)")];
    cells.forEach(cell => cell.classList.remove("stays")); // where a cell is kept, it does not tell where it belongs
    const ends = new Map(cells.map(cell => [cell, cell.offsetLeft + cell.offsetWidth]));
    const edge = Math.max(0, ...names.map(cell => ends.get(cell)));
    for (const cell of cells) {
      cell.style.left = ends.get(cell) - cell.offsetWidth + "px";
      cell.classList.toggle("stays", scrolls && edge < 0.6 * width && ends.get(cell) <= edge + 1);
    }
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

// What a generated link leads to (its title) shows under the mouse and under the keyboard; Escape puts it away. Phones
// do not hover: there a tap follows the link.
addEventListener("DOMContentLoaded", () => {
  const box = document.createElement("div");
  let link = null, waiting = 0;
  Object.assign(box, { id: "preview", hidden: true }).setAttribute("role", "tooltip");
  document.body.append(box);

  const leave = () => {
    clearTimeout(waiting);
    link?.setAttribute("title", box.textContent);
    link?.removeAttribute("aria-describedby");
    [box.hidden, link] = [true, null];
  };
  const show = to => {
    if (to == link) return clearTimeout(waiting);
    leave();
    [link, box.textContent, box.hidden] = [to, to.title, false];
    to.removeAttribute("title"); // the browser would show it a second time
    to.setAttribute("aria-describedby", box.id);
    const lines = to.getClientRects(), first = lines[0], last = lines[lines.length - 1];
    const below = last.bottom + box.offsetHeight + 6 < innerHeight;
    const room = document.documentElement.clientWidth - box.offsetWidth - 8;
    box.style.left = scrollX + Math.max(8, Math.min(below ? last.left : first.left, room)) + "px";
    box.style.top = scrollY + (below ? last.bottom + 3 : first.top - box.offsetHeight - 3) + "px";
  };

  // Whoever moves the mouse from the link to the text has a moment to arrive there.
  document.addEventListener("pointerover", event => {
    const to = event.pointerType != "touch" && event.target.closest("a.cross[title], a.cross[aria-describedby]");
    clearTimeout(waiting);
    if (to) show(to);
    else if (link && event.target != box && !link.matches(":focus-visible")) waiting = setTimeout(leave, 200);
  });
  document.addEventListener("focusin", event => event.target.matches("a.cross:focus-visible") && show(event.target));
  document.addEventListener("focusout", leave);
  addEventListener("keydown", event => event.key == "Escape" && (box.hidden = true));
});

// Formulas are set a few at a time, what shows first: a page of a thousand of them can be read and used at once. Who
// waits for MathJax.startup.promise waits for all of them.
addEventListener("DOMContentLoaded", () => {
  const startup = window.MathJax?.startup;
  if (!startup?.promise) return; // a page without formulas
  const formulas = [...document.querySelectorAll(".math")].map(box => ({ box, top: box.getBoundingClientRect().top }));
  const [before, after] = [formulas.filter(({ top }) => top < 0).reverse(), formulas.filter(({ top }) => top >= 0)];
  const boxes = [...after, ...before].map(({ box }) => box);
  const size = Math.max(12, Math.ceil(boxes.length / 40)); // each time, the whole page is laid out again
  const set = async () => {
    while (boxes.length) {
      await MathJax.typesetPromise(boxes.splice(0, size));
      await new Promise(done => setTimeout(done));
    }
  };
  startup.promise = startup.promise.then(set);
});

// Who touches a slider, or comes to it by keyboard, will move it: then its frames are fetched.
for (const kind of ["pointerover", "focusin"])
  document.addEventListener(kind, event => {
    const box = event.target.closest?.("[id^=frames-]:not([data-fetched])");
    if (!box) return;
    box.dataset.fetched = "";
    for (const [file] of box.querySelector("script").textContent.matchAll(/[^"]+\.webp/g)) new Image().src = file;
  });

// What the theme calls a PDF prints the page that is shown.
addEventListener("DOMContentLoaded", () => {
  for (const name of document.querySelectorAll(".btn-download-pdf-button .btn__text-container"))
    name.textContent = "print this page";
});
