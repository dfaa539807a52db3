// Make elements of the page.

/** A new element; its text is text, whatever it says. */
export function make(tag, kind = "", text = "") {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text) node.textContent = text;
  return node;
}

export const byId = id => document.getElementById(id);

/** A button. */
export function button(kind, text, onclick) {
  const node = make("button", kind, text);
  node.type = "button";
  node.onclick = onclick;
  return node;
}

/** A button that copies what source() returns. */
export function copyButton(label, source) {
  const node = button("small", "Copy", async () => {
    const copied = await copy(source());
    node.textContent = copied ? "Copied" : "Not copied";
    announce(node.textContent);
    setTimeout(() => { node.textContent = "Copy"; }, 1500);
  });
  node.setAttribute("aria-label", label);
  return node;
}

/** Put text on the clipboard; return whether it worked. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);  // there is none on a page without encryption from another machine
    return true;
  } catch {
    const field = make("textarea", "unseen");
    field.value = text;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    return copied;
  }
}

/** Say something to those who do not see the page. */
export function announce(text) {
  byId("status").textContent = text;
}
