// The state of the page is the query string of its address. Everybody who changes what is shown calls `change`.

let inFlight = null;

/** Return the parameters of the address. */
export function read() {
  return new URLSearchParams(location.search);
}

/** Return the ids in a parameter such as `good`, as strings. */
export function ids(name) {
  return (read().get(name) || "").split(",").filter(Boolean);
}

/**
 * Change parameters of the address and show the answer to it.
 *
 * `updates` maps names to a value, to a list of values, or to null or "" to remove the parameter. `replace` keeps the
 * entry of the history. `answer: false` changes the address only.
 */
export function change(updates, { replace = false, answer = true, keepScroll = false } = {}) {
  const parameters = read();
  for (const [name, value] of Object.entries(updates)) {
    parameters.delete(name);
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== null && item !== undefined && item !== "") parameters.append(name, item);
    }
  }
  const query = parameters.toString();
  if (query !== read().toString()) {
    history[replace ? "replaceState" : "pushState"](null, "", query ? `/?${query}` : "/");
  }
  announce("orbithash:address", {});
  return answer ? refresh({ keepScroll }) : Promise.resolve(true);
}

/** Show the answer to the address. Return whether it arrived. */
export async function refresh({ keepScroll = false } = {}) {
  inFlight?.abort();
  const request = new AbortController();
  inFlight = request;
  document.getElementById("answer").setAttribute("aria-busy", "true");
  const slow = setTimeout(() => document.documentElement.classList.add("busy"), 120);
  try {
    const response = await fetch(`/${location.search}`, {
      headers: { "HX-Request": "true", "HX-Current-URL": location.href },
      signal: request.signal,
    });
    const content = await response.text();
    if (inFlight !== request) return false;
    if (response.headers.get("HX-Redirect")) {
      location.assign(response.headers.get("HX-Redirect"));
      return false;
    }
    // The header says that the answer holds sentences about problems, and no tiles.
    if (!response.ok || response.headers.get("HX-Reswap") === "none") {
      announce("orbithash:problem", { status: response.status, content, again: () => refresh({ keepScroll }) });
      return false;
    }
    show(content, keepScroll);
    return true;
  } catch (error) {
    if (error.name === "AbortError") return false;
    announce("orbithash:problem", { status: 0, content: "", again: () => refresh({ keepScroll }) });
    return false;
  } finally {
    if (inFlight === request) {
      inFlight = null;
      clearTimeout(slow);
      document.documentElement.classList.remove("busy");
      document.getElementById("answer").removeAttribute("aria-busy");
    } else {
      clearTimeout(slow);
    }
  }
}

function show(content, keepScroll) {
  const answer = document.getElementById("answer");
  const top = document.getElementById("columns").getBoundingClientRect().top;
  htmx.swap(answer, content, { swapStyle: "outerHTML", swapDelay: 0, settleDelay: 0 });
  if (!keepScroll && top < 0) scrollBy({ top });
  nameTab();
  announce("orbithash:answer", {});
}

/** Name the tab, and with it the entry of the history, after the sentence. */
function nameTab() {
  const sentence = read().get("q");
  document.title = sentence ? `${sentence.slice(0, 60)} – orbithash` : "orbithash";
}

nameTab();

function announce(name, detail) {
  document.dispatchEvent(new CustomEvent(name, { detail }));
}

addEventListener("popstate", () => {
  announce("orbithash:address", {});
  refresh();
});
