// The circuitsvis program, which the page holds compressed, and the figures that wait for it.
(() => {
  const packed = document.querySelector(".tlr-circuitsvis").textContent;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  new Response(plain).text().then((program) => {
    document.head.append(Object.assign(document.createElement("script"), { textContent: program }));
    for (const draw of tlrFigures) draw();
  });
})();
