"use strict";
// A click on a column's head sorts the methods by it, best first, and again the other way round.
for (const table of document.querySelectorAll("table.figures")) {
  const heads = [...table.querySelectorAll("thead tr:last-child th")];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const better = head.querySelector("button").title.startsWith("higher") ? "descending" : "ascending";
    const worse = better === "descending" ? "ascending" : "descending";
    head.querySelector("button").addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === better ? worse : better;
      heads.forEach(other => other.setAttribute("aria-sort", other === head ? order : "none"));
      const key = row => row.cells[column + 1].dataset.value;
      const rows = [...body.rows].sort((a, b) => {
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        return order === "ascending" ? key(a) - key(b) : key(b) - key(a);
      });
      body.append(...rows);
    });
  });
}
