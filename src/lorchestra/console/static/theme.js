// Before anything is drawn: the colours that were chosen, if any were.
try {
  const chosen = localStorage.getItem("lorchestra-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // storage is closed to us: the system's colours it is
}
