for (const button of document.querySelectorAll("button[data-table]")) {
  button.addEventListener("click", () => {
    const quoted = (text) => /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
    const rows = [...document.getElementById(button.dataset.table).rows].map((row) => [...row.cells]
      .filter((cell) => !cell.classList.contains("wide"))
      .map((cell) => quoted((cell.dataset.csv ?? cell.textContent).trim())).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([rows.join("\r\n") + "\r\n"], {type: "text/csv"}));
    link.download = button.dataset.table + ".csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

for (const explorer of document.querySelectorAll(".explorer")) {
  const picks = [...explorer.querySelectorAll(".pick")], cards = [...explorer.querySelectorAll(".card")];
  const choose = (chosen) => {
    picks.forEach((pick, i) => pick.setAttribute("aria-pressed", String(i === chosen)));
    cards.forEach((card, i) => { card.hidden = i !== chosen; });
  };
  picks.forEach((pick, i) => pick.addEventListener("click", () => choose(i)));
  choose(0);
}
