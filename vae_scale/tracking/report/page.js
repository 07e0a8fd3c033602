"use strict";

// Charts, in the colors of the system's theme.
const plots = [];
const applyTheme = (plot) => {
  const style = getComputedStyle(document.documentElement);
  const [text, muted, border, surface] = ["text", "muted", "border", "surface"].map((name) => style.getPropertyValue(`--${name}`).trim());
  const colors = { "font.color": muted, "hoverlabel.bgcolor": surface, "hoverlabel.bordercolor": border, "hoverlabel.font.color": text };
  for (const axis of Object.keys(plot.layout).filter((name) => /^[xy]axis/.test(name)))
    Object.assign(colors, { [`${axis}.gridcolor`]: border, [`${axis}.linecolor`]: border });
  return Plotly.relayout(plot, colors);
};
for (const chart of document.querySelectorAll(".chart")) {
  const { data, layout } = JSON.parse(chart.querySelector("script").textContent);
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // dragging scrolls the page
  const plot = chart.querySelector(".plot");
  Plotly.newPlot(plot, data, layout, { displayModeBar: false, responsive: true }).then(applyTheme);
  plots.push(plot);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(applyTheme));

// The legend's checkboxes hide runs.
for (const checkbox of document.querySelectorAll(".legend input"))
  checkbox.addEventListener("change", () => {
    for (const plot of plots) {
      const traces = plot.data.flatMap((trace, index) => (trace.meta?.run === Number(checkbox.dataset.run) ? [index] : []));
      if (traces.length) Plotly.restyle(plot, { visible: checkbox.checked }, traces);
    }
  });

// Each gallery shows the newest image of each run up to the position of the slider.
for (const gallery of document.querySelectorAll(".gallery")) {
  const positions = JSON.parse(gallery.dataset.positions);
  const [slider, button, label] = ["input", "button", "output"].map((name) => gallery.querySelector(name));
  const update = () => {
    const imagesSeen = positions[slider ? slider.value : 0];
    for (const figure of gallery.querySelectorAll("figure")) {
      const images = [...figure.querySelectorAll("img")];
      const visible = images.findLast((image) => image.dataset.images <= imagesSeen);
      for (const image of images) image.hidden = image !== visible;
      figure.querySelector(".caption").textContent = visible ? `after ${Number(visible.dataset.images).toLocaleString("en")} images` : "no image yet";
    }
    if (slider) slider.ariaValueText = label.value = `${imagesSeen.toLocaleString("en")} images seen`;
  };
  update();
  if (!slider) continue;
  let timer = null;
  const pause = () => {
    timer = clearInterval(timer);
    button.textContent = "Play";
  };
  const next = () => {
    slider.value = Number(slider.value) + 1;
    update();
    if (slider.value === slider.max) pause();
  };
  slider.addEventListener("input", () => (pause(), update()));
  button.addEventListener("click", () => {
    if (timer) return pause();
    if (slider.value === slider.max) slider.value = 0;
    button.textContent = "Pause";
    timer = setInterval(next, 600);
    update();
  });
}
