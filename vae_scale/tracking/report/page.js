"use strict";

const plots = [];
for (const chart of document.querySelectorAll(".chart")) {
  const { data, layout } = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot");
  Plotly.newPlot(plot, data, layout, { displayModeBar: false, responsive: true });
  plots.push(plot);
}

// The legend's checkboxes hide runs.
for (const checkbox of document.querySelectorAll(".legend input"))
  checkbox.addEventListener("change", () => {
    for (const plot of plots) {
      const traces = plot.data.flatMap((trace, index) => (trace.meta.run === Number(checkbox.dataset.run) ? [index] : []));
      if (traces.length) Plotly.restyle(plot, { visible: checkbox.checked }, traces);
    }
  });

// Each gallery shows the newest image of each run up to the position of the slider.
for (const gallery of document.querySelectorAll(".gallery")) {
  const [slider, label] = ["input", "output"].map((name) => gallery.querySelector(name));
  const imagesSeen = [...gallery.querySelectorAll("img")].map((image) => Number(image.dataset.images));
  const positions = [...new Set(imagesSeen)].sort((a, b) => a - b);
  const update = () => {
    const position = positions[slider.value];
    label.value = `${position.toLocaleString("en")} images seen`;
    for (const figure of gallery.querySelectorAll("figure")) {
      const images = [...figure.querySelectorAll("img")];
      const visible = images.findLast((image) => image.dataset.images <= position);
      for (const image of images) image.hidden = image !== visible;
    }
  };
  slider.min = 0;
  slider.value = slider.max = positions.length - 1;
  slider.addEventListener("input", update);
  update();
}
