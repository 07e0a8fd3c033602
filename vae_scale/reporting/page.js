"use strict";

// Charts. Their colours are the page's, which follow the theme of the system.
const plots = [];
const paint = (plot) => {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line, surface] = ["ink", "soft", "line", "surface"].map((name) => style.getPropertyValue(`--${name}`).trim());
  const colours = { "font.color": soft, "hoverlabel.bgcolor": surface, "hoverlabel.bordercolor": line, "hoverlabel.font.color": ink };
  for (const axis of Object.keys(plot.layout).filter((name) => /^[xy]axis/.test(name)))
    Object.assign(colours, { [`${axis}.gridcolor`]: line, [`${axis}.linecolor`]: line });
  return Plotly.relayout(plot, colours);
};
for (const chart of document.querySelectorAll(".chart")) {
  const { data, layout } = JSON.parse(chart.querySelector("script").textContent);
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false; // a finger scrolls the page
  const plot = chart.querySelector(".plot");
  Plotly.newPlot(plot, data, layout, { displayModeBar: false, responsive: true }).then(paint);
  plots.push(plot);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(paint));

// The legend takes runs out of the curves.
for (const box of document.querySelectorAll(".legend input"))
  box.addEventListener("change", () => {
    for (const plot of plots) {
      const traces = plot.data.flatMap((trace, number) => (trace.meta?.run === Number(box.dataset.run) ? [number] : []));
      if (traces.length) Plotly.restyle(plot, { visible: box.checked }, traces);
    }
  });

// Pictures. Each run shows its newest one up to where the slider stands.
for (const gallery of document.querySelectorAll(".gallery")) {
  const places = JSON.parse(gallery.dataset.images);
  const [slider, button, label] = ["input", "button", "output"].map((name) => gallery.querySelector(name));
  const show = () => {
    const seen = places[slider ? slider.value : 0];
    for (const figure of gallery.querySelectorAll("figure")) {
      const pictures = [...figure.querySelectorAll("img")];
      const shown = pictures.findLast((picture) => picture.dataset.images <= seen);
      for (const picture of pictures) picture.hidden = picture !== shown;
      figure.querySelector(".shown").textContent = shown ? `after ${Number(shown.dataset.images).toLocaleString("en")} images` : "no picture yet";
    }
    if (slider) slider.ariaValueText = label.value = `${seen.toLocaleString("en")} images seen`;
  };
  show();
  if (!slider) continue;
  let timer = null;
  const pause = () => {
    timer = clearInterval(timer);
    button.textContent = "Play";
  };
  const step = () => {
    slider.value = Number(slider.value) + 1;
    show();
    if (slider.value === slider.max) pause();
  };
  slider.addEventListener("input", () => (pause(), show()));
  button.addEventListener("click", () => {
    if (timer) return pause();
    if (slider.value === slider.max) slider.value = -1; // clamped to 0
    else slider.value = Number(slider.value);
    button.textContent = "Pause";
    timer = setInterval(step, 600);
    show();
  });
}
