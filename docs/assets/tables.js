// A filter above every long table: rows stay that hold all words. On a narrow screen, rows with long texts are shown as
// lists of their cells.
const withFilter = (table, rows) => {
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filter = document.createElement("div");
  filter.className = "filter";
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "Filter this table";
  field.setAttribute("aria-label", "Filter this table");
  const count = document.createElement("span");
  const show = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, place) => {
      row.hidden = !words.every((word) => texts[place].includes(word));
      if (!row.hidden) shown += 1;
    });
    count.textContent = `${shown} of ${rows.length}`;
  };
  field.addEventListener("input", show);
  filter.append(field, count);
  (table.closest(".md-typeset__scrollwrap") ?? table).before(filter);
  show();
};

const asCards = (table, rows) => {
  table.dataset.cards = "";
  const titles = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  for (const row of rows) [...row.cells].forEach((cell, place) => (cell.dataset.title = titles[place]));
};

const isLong = (cell) => !cell.style.textAlign && cell.textContent.length > 60;

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".md-typeset table:not(.highlighttable)")) {
    const rows = [...(table.tBodies[0]?.rows ?? [])];
    if (!table.tHead || !rows.length) continue;
    if (rows.length >= 15) withFilter(table, rows);
    if (rows[0].cells.length > 2 && rows.some((row) => [...row.cells].some(isLong))) asCards(table, rows);
  }
});
