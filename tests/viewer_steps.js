// What a reader does with the page; test_rollout.py puts this into it, and reads the report from its title.
const report = { said: cards.map(card => card.innerText), shown: [] };
const count = query => current.querySelectorAll(query).length;
const note = () => report.shown.push(
  [cards.filter(card => !card.hidden).length, count("li:not(.later)"), count('svg g:not([style*="none"])')]);
const press = key => { document.dispatchEvent(new KeyboardEvent("keydown", { key })); note(); };
const choose = (id, value) => {
  document.getElementById(id).value = value; document.querySelector("form").oninput(); note(); };
note(); press("ArrowLeft"); press("ArrowLeft"); press("ArrowLeft"); press("ArrowRight");
choose("verdict", "right"); choose("verdict", ""); choose("least", 3); choose("least", "");
choose("kind", "sign");
report.scripts = document.scripts.length;
report.loaded = [...document.images].every(image => image.naturalWidth);
document.title = JSON.stringify(report);
