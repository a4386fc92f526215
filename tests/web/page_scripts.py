"""What the tests of the page run in the browser."""

from __future__ import annotations

FOCUSED = """(() => {
  const element = document.activeElement;
  return element.innerText || element.getAttribute("aria-label")
    || element.closest("label")?.innerText || "";
})()"""
"""The name of the component that has the focus."""

DROPPED_FILE = """(text) => {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "image.png", {type: "image/png"}));
  return data;
}"""
"""What a browser passes on when a file is dropped."""

OUTSIDE = """() => Array
  .from(document.querySelectorAll("button, input, textarea, img, p, h1, h2, h3"))
  .filter((element) => element.checkVisibility({visibilityProperty: true, opacityProperty: true}))
  .filter((element) => element.type !== "file")
  .filter((element) => {
    const box = element.getBoundingClientRect();
    return box.width > 1 && (box.left < 0 || box.right > window.innerWidth + 1);
  })
  .map((element) => element.outerHTML.slice(0, 200))"""
"""What is to the left or right of the screen."""

LOW_CONTRAST = """() => {
  const parse = (text) => {
    const values = text.match(/[0-9.]+/g).map(Number);
    return values.length === 3 ? [...values, 1] : values;
  };
  const blend = (top, below) =>
    top.slice(0, 3).map((value, k) => value * top[3] + below[k] * (1 - top[3]));
  const luminance = (color) => {
    const linear = color.map((value) => value / 255).map((value) =>
      value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ratio = (element, color) => {
    const layers = [];
    for (let parent = element; parent; parent = parent.parentElement)
      layers.push(parse(getComputedStyle(parent).backgroundColor));
    const background = layers.reduceRight((below, top) => blend(top, below), [255, 255, 255]);
    const [dark, light] = [blend(parse(color), background), background]
      .map(luminance).sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const low = {};
  const check = (element, text, color) => {
    const value = ratio(element, color);
    if (value < 4.5) low[text.trim()] = value;
  };
  const isShown = (element) =>
    element.checkVisibility({visibilityProperty: true, opacityProperty: true})
    && !element.closest("script, style, noscript, [disabled]")
    && !element.closest(".image-container .empty");  // it is drawn on a canvas
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim() && isShown(element))
      check(element, walker.currentNode.data, getComputedStyle(element).color);
  }
  for (const element of document.querySelectorAll("[placeholder]"))
    if (element.placeholder && isShown(element))
      check(element, element.placeholder, getComputedStyle(element, "::placeholder").color);
  return low;
}"""
"""Texts whose contrast is too low for WCAG 2.2, level AA."""
