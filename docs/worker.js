// Lets the search work where the site is opened as files: browsers start no worker from a file, so its script
// runs in a hidden frame instead, and the messages are passed by hand.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      const run = (source) =>
        new Promise((done) => {
          const script = frame.contentDocument.createElement("script");
          script.src = source;
          script.onload = done;
          frame.contentDocument.head.append(script);
        });
      inside.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => run(new URL(source, url))), Promise.resolve());
      inside.postMessage = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      this.tell = (data) => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
      run(url).then(() => {
        this.ready = true;
        this.waiting.splice(0).forEach(this.tell);
      });
    }

    postMessage(data) {
      if (this.ready) this.tell(data);
      else this.waiting.push(data);
    }

    terminate() {}
  };
}
