// The page of cdt-serve: asks its own paths, keeps the token for this tab alone.
const at = (id) => document.getElementById(id);
const KEY = "cdt-token";

const fragment = new URLSearchParams(location.hash.slice(1)).get("token");
if (fragment) {
  sessionStorage.setItem(KEY, fragment);
  history.replaceState(null, "", location.pathname);
}

class Refused extends Error {}

async function ask(path, body) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(KEY) ?? ""}` };
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body });
  } catch {
    throw new Refused("The service does not answer: is cdt-serve still running?");
  }
  if (answer.status === 401) {
    showDoor("That is not its token.");
    throw new Refused("The token is not known.");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Refused(told.error ?? `The service answers ${answer.status}.`);
  }
  return answer;
}

function made(kind, text, name) {
  const element = document.createElement(kind);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function facts(pairs) {
  const list = made("dl");
  for (const [term, told] of pairs) list.append(made("dt", term), made("dd", told));
  return list;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function showDoor(said) {
  at("door").hidden = false;
  at("work").hidden = true;
  at("door-said").textContent = sessionStorage.getItem(KEY) ? said : "";
  at("token").focus();
}

async function start() {
  if (!sessionStorage.getItem(KEY)) return showDoor("");
  try {
    await describe();
  } catch (error) {
    if (at("door").hidden) at("model").textContent = error.message;
    return;
  }
  at("door").hidden = true;
  at("work").hidden = false;
}

async function describe() {
  const model = await (await ask("/v1/model")).json();
  const { scans } = await (await ask("/v1/scans")).json();
  const names = Object.keys(model.classes);
  at("model").textContent = `${model.bundle}: ${names.join(", ")}. Trained on ${model.training_data}`;
  at("classes").replaceChildren(...names.map((name) => Object.assign(made("option"), { value: name })));
  const chosen = at("scan").value;
  const none = at("scan").options[0];
  at("scan").replaceChildren(none, ...scans.map((name) => Object.assign(made("option", name), { value: name })));
  at("scan").value = scans.includes(chosen) ? chosen : "";
  at("teach").hidden = model.read_only;
}

function form(files, field, more = {}) {
  const data = new FormData();
  for (const file of files) data.append(field, file, file.name);
  const told = { ct: at("scan").value, channels: at("channels").value, mpp: at("mpp").value, ...more };
  for (const [name, value] of Object.entries(told)) if (value !== "") data.append(name, value);
  return data;
}

function shown(answer, file) {
  const item = made("li");
  const best = Object.entries(answer.probabilities).sort((one, other) => other[1] - one[1]);
  const verdict = answer.abstained ? "Can't tell" : `${answer.label}, ${percent(best[0][1])}`;
  item.append(made("p", answer.tile, "name"), made("p", verdict, "verdict"));
  if (answer.reason) item.append(made("p", answer.reason));
  const bars = made("ul", undefined, "bars");
  for (const [name, chance] of best) {
    const row = made("li");
    const line = made("div", undefined, "line");
    line.append(made("span", name), made("span", percent(chance)));
    const track = made("div", undefined, "track");
    const fill = made("div", undefined, "fill");
    fill.style.width = percent(chance).replace(" ", "");
    track.append(fill);
    row.append(line, track);
    bars.append(row);
  }
  const doubt = [
    ["Unlikeness", `${answer.unlikeness.toFixed(2)} of the distance beyond which there is no answer`],
    ["CT", answer.ct ? `${answer.ct.series}. ${answer.ct.off ?? "The answer rests on it."}` : "none: the tile alone decides"],
    ...answer.warnings.map((text) => ["Warning", text]),
    ["Engine", answer.backend],
  ];
  if (answer.prediction_set) doubt.splice(1, 0, ["Set", answer.prediction_set.join(", ") || "no class"]);
  const card = made("button", `Evidence of ${answer.tile}`);
  card.type = "button";
  card.addEventListener("click", () => showCard(card, file, answer.tile));
  item.append(bars, facts(doubt), card);
  return item;
}

async function showCard(button, file, name) {
  button.disabled = true;
  try {
    const page = await (await ask("/v1/card", form([file], "tile"))).text();
    at("card-title").textContent = `Evidence of ${name}`;
    at("card").title = `Evidence card of ${name}`;
    at("card").srcdoc = page;
    at("card-place").hidden = false;
    at("card-title").tabIndex = -1;
    at("card-title").focus();
  } catch (error) {
    at("progress").textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

async function classify(files) {
  const button = at("ask").querySelector("button");
  at("ask-said").textContent = "";
  if (!files.length) {
    at("ask-said").textContent = "Choose a tile first.";
    at("tiles").focus();
    return;
  }
  button.disabled = true;
  at("answers").replaceChildren();
  at("card-place").hidden = true;
  const failed = [];
  try {
    for (const [place, file] of files.entries()) {
      at("progress").textContent = `Tile ${place + 1} of ${files.length} ...`;
      try {
        const answer = await (await ask("/v1/classify", form([file], "tile"))).json();
        at("answers").append(shown(answer, file));
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        failed.push(error.message);
      }
    }
  } finally {
    button.disabled = false;
  }
  const answered = files.length - failed.length;
  at("progress").textContent = `${answered} of ${files.length} ${files.length === 1 ? "tile" : "tiles"} answered.`;
  at("ask-said").textContent = failed.join(" ");
}

async function enrol(dryRun) {
  const buttons = at("teach").querySelectorAll("button");
  buttons.forEach((one) => { one.disabled = true; });
  at("teach-said").textContent = "";
  try {
    const data = form([...at("examples").files], "tiles", { label: at("label").value, dry_run: dryRun });
    const told = await (await ask("/v1/enrol", data)).json();
    const share = (value) => (value === null ? "unknown" : percent(value));
    const pairs = [
      [told.written ? "Written" : "Would be", told.what],
      ["Left out, right", `${share(told.left_out_accuracy_before)} before, ${share(told.left_out_accuracy)} after`],
      ...told.mislabelled.map((one) => ["Looks mislabelled", `${one.tile}: taken for ${one.nearest}`]),
      ...told.too_close.map((one) => ["Too close", `${one.first} and ${one.second}`]),
    ];
    at("taught").replaceChildren(facts(pairs));
    if (told.written) await describe();
  } catch (error) {
    at("teach-said").textContent = error.message;
  } finally {
    buttons.forEach((one) => { one.disabled = false; });
  }
}

at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("token").value.trim());
  at("token").value = "";
  start();
});
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  classify([...at("tiles").files]);
});
at("teach").addEventListener("submit", (event) => {
  event.preventDefault();
  enrol(event.submitter?.value !== "write");
});
for (const name of ["dragenter", "dragover"]) {
  at("drop").addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  at("drop").addEventListener(name, () => at("drop").classList.remove("over"));
}
at("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  at("tiles").files = event.dataTransfer.files;
  classify([...at("tiles").files]);
});
start();
