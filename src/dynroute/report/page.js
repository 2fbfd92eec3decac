// Tables sort by a click on a header and shrink to the rows that hold the words of a filter. Without this file all is there to read.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const text = (row, i) => row.cells[i].textContent.trim();
  const compare = (a, b) => {
    const x = parseFloat(a), y = parseFloat(b);
    return isNaN(x) || isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  };
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
      const filled = rows.filter((row) => text(row, i)), empty = rows.filter((row) => !text(row, i));
      filled.sort((a, b) => down * compare(text(a, i), text(b, i)));
      body.append(...filled, ...empty);
    });
  });
  if (rows.length < 8) continue;
  const filter = document.createElement("input");
  filter.type = "search";
  filter.className = "filter";
  filter.placeholder = `Filter ${rows.length} rows`;
  filter.setAttribute("aria-label", `Filter: ${table.parentElement.getAttribute("aria-label")}`);
  const content = rows.map((row) => row.textContent.toLowerCase());
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    rows.forEach((row, i) => (row.hidden = !words.every((word) => content[i].includes(word))));
  });
  table.parentElement.before(filter);
}
