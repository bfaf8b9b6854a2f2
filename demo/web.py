"""A page to talk to a model about pictures: several pictures, several turns, several visitors.

    pip install gradio
    python demo/web.py [--model DIR] [--quantize int4] [--port 7860]

Visitors are answered at the same time: one token for each in turn, since the model does one thing at a time. What a
visitor's conversation has cached is kept for the next turn, of the last few visitors. Boxes that an answer of
DeepSeek-VL2 locates are drawn on the last picture.
"""

from __future__ import annotations

import html
import socket
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

DEMO = Path(__file__).resolve().parent
sys.path[:0] = [str(DEMO.parent)]

import generate
from load_weights import load_model
from model import DeepseekVL
from processor import MAX_DOWNLOAD_BYTES, Processor, draw_boxes, load_image, parse_boxes, reason

try:
    import gradio as gr
except ImportError:
    gr = None

VISITORS = 4  # answered at the same time, and with a cache that is kept
EXAMPLES = [
    ("Describe this image.", "scene.png"), ("What does the sign say?", "scene.png"), ("Read the text.", "photo.png"),
    ("Which is higher, the yellow star or the green circle?", "scene.png"), ("Describe this image.", "drawing.png"),
]  # fmt: skip


class Chat:
    """One model, asked by several visitors."""

    def __init__(self, model: DeepseekVL, processor: Processor, chunk_size: int | None):
        self.model, self.processor, self.chunk_size = model, processor, chunk_size
        self.caches: dict[str, generate.ConversationCache] = {}  # by visitor, the last one last
        self.step = threading.Lock()

    def answer(self, visitor: str, batch: dict, **options) -> Iterator[tuple[str, int]]:
        """After each token: the answer so far, and the token's id."""
        cache = self.caches.pop(visitor, None) or generate.ConversationCache(self.model)
        text, answer, id = generate.TextStream(self.processor.tokenizer), "", None
        ids = generate.stream(self.model, batch, cache=cache, chunk_size=self.chunk_size, **options)
        try:
            while (new := self.next_id(ids)) is not None:
                id, answer = new, answer + text.push(new)
                yield answer.strip(), id
            yield (answer + text.finish()).strip(), id
        finally:  # also after a stop
            self.caches[visitor] = cache
            for forgotten in list(self.caches)[:-VISITORS]:
                self.caches.pop(forgotten, None)

    def next_id(self, ids: Iterator[int]) -> int | None:
        with self.step:
            return next(ids, None)

    def leave(self, request: gr.Request) -> None:
        self.caches.pop(request.session_hash, None)

    def respond(
        self, question: dict, shown: list[dict], messages: list[dict],
        temperature: float, top_p: float, repetition_penalty: float, max_new_tokens: int, request: gr.Request,
    ) -> Iterator[tuple]:  # fmt: skip
        """What a question makes of the box it was written in, of what is shown, and of the conversation."""
        text, files = question["text"].strip(), question["files"]
        sampling = {"temperature": temperature, "top_p": top_p, "repetition_penalty": repetition_penalty}
        try:
            if not text and not files:
                raise ValueError("write a question, or add a picture")
            text = text or "Describe this image."
            messages = [*messages, {"role": "user", "content": text, "images": files}]
            shown = [*shown, {"role": "user", "content": [*({"path": file} for file in files), text]}]
            batch = self.processor(messages)
            yield None, shown, gr.skip()
            for answer, id in self.answer(request.session_hash, batch, max_new_tokens=max_new_tokens, **sampling):
                ended = id in self.model.config.end_token_ids
                if answer:
                    reply = {"role": "assistant", "content": answer}
                    yield gr.skip(), [*shown, reply], [*messages, reply]
            if not ended:
                gr.Info("The answer was cut off: it is as long as Max Generation Tokens or the model's context allow.")
            pictures = [file for message in messages for file in message.get("images", [])]
            if pictures and "<|det|>" in answer:
                picture = load_image(pictures[-1])
                if boxes := parse_boxes(answer, picture.size):
                    drawn = {"role": "assistant", "content": gr.Image(draw_boxes(picture, boxes))}
                    yield gr.skip(), [*shown, reply, drawn], gr.skip()
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            why = reason(error)
            for file in files:
                why = why.replace(file, Path(file).name)
            gr.Warning(html.escape(why), title="Not answered")


def build_page(chat: Chat, title: str, notice: str) -> gr.Blocks:
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400), fill_height=True) as page:
        gr.Markdown(f"# {title}\n{notice}")
        messages = gr.State([])
        shown = gr.Chatbot(show_label=False, buttons=["copy"], scale=1, min_height=300)
        question = gr.MultimodalTextbox(
            label="Question", show_label=False, file_types=["image"], file_count="multiple", placeholder="A question"
        )
        with gr.Row():
            stop, clear = gr.Button("Stop"), gr.ClearButton([shown, messages, question], value="New conversation")
        with gr.Accordion("Options", open=False):
            options = [
                gr.Slider(0, 1, 0, step=0.1, label="Temperature"),
                gr.Slider(0.05, 1, 1, step=0.05, label="Top-p"),
                gr.Slider(0.1, 2, 1, step=0.1, label="Repetition penalty"),
                gr.Slider(8, 4096, 512, step=8, label="Max Generation Tokens"),
            ]
        gr.Examples([[{"text": text, "files": [str(DEMO / "images" / name)]}] for text, name in EXAMPLES], question)
        answering = question.submit(
            chat.respond, [question, shown, messages, *options], [question, shown, messages], concurrency_limit=VISITORS
        )
        stop.click(None, cancels=answering)
        clear.click(chat.leave, cancels=answering)
        shown.clear(list, None, messages, cancels=answering)  # the chat's own button
        page.unload(chat.leave)
    return page


def run(args: Namespace) -> None:
    generate.check_options(chunk_size=args.chunk_size)
    if not 0 < args.port < 2**16:
        raise ValueError(f"--port {args.port}: expected 1 to 65535")
    try:  # before the model is loaded
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]
        raise ValueError(f"cannot listen on --host {args.host} --port {args.port}: {why}") from None
    if gr is None:
        raise ValueError("the page needs Gradio: pip install gradio")
    processor, device = Processor(args.model), generate.pick_device(args.device)
    model = load_model(
        args.model, dtype=generate.pick_dtype(args.dtype, device), device=device, quantize=args.quantize, pack=True,
        tokenizer=processor.tokenizer, progress=lambda share: generate.note(f"{share:.0%} of {args.model} loaded"),
    )  # fmt: skip
    notice = generate.demo_notice(args.model)
    notice = f"{notice.capitalize()}." if notice else ""
    page = build_page(Chat(model, processor, args.chunk_size), "DeepSeek-VL", notice)
    page.launch(
        server_name=args.host, server_port=args.port, share=False, max_file_size=MAX_DOWNLOAD_BYTES,
        prevent_thread_lock=True, quiet=True,
    )  # fmt: skip
    generate.tell(f"http://{args.host}:{args.port}, until Ctrl-C")
    page.block_thread()


def main(arguments: list[str] | None = None) -> None:
    parser = generate.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=DEMO / "checkpoint", metavar="DIR", help="default: demo/checkpoint")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    add("--port", type=int, default=7860, help="default: %(default)s")
    add("--chunk-size", type=int, metavar="N", help="prefill N tokens at a time, to save memory")
    add("--dtype", choices=("auto", *generate.DTYPES), default="auto", help="of what is not quantized")
    add("--quantize", choices=("int8", "int4"), help="round decoder and head to 8 or 4 bits")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    with generate.told():
        run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
