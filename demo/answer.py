"""Answer a file of questions, in batches, with as many processes as there are devices.

    python demo/answer.py questions.jsonl answers.jsonl --model DIR --batch-size 8
    torchrun --nproc-per-node=4 demo/answer.py questions.jsonl answers.jsonl --model DIR

Each line of the questions is JSON: {"id": "a", "prompt": "What does the sign say?", "images": ["scene.png"]}.
Each line of the answers too, in the same order: {"id": "a", "answer": "It says PUSH."}, with "cut": true where
--max-new-tokens or the model's context ended the answer; {"id": "b", "error": "..."} where there is none.

Process R appends its answers to answers.jsonl.part-R; at the end, process 0 joins all parts. After a stop at any moment
the same command goes on, with the same number of processes or another: it first joins the parts it finds, then skips
the questions that have an answer, and asks again those that have an error. Several machines need one file system.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
import torch.distributed as dist
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent)]

from generate import DEMO, Parser, TextStream, check_options, generate, note, pick_device, pick_dtype, tell, told
from load_weights import load_model
from model import DeepseekVL
from processor import Processor, reason

# ------------------------------------------------------------------------------------------- files

LINES = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}  # \ud800, a lone surrogate, is valid JSON


class Question(NamedTuple):
    """A line of the questions; `error` says why it cannot be asked."""

    id: str | int | None
    prompt: str = ""
    images: Sequence[str] = ()
    error: str = ""


def parse_question(line: bytes, number: int) -> Question:
    id = None
    try:
        fields = json.loads(line.decode("utf-8-sig"))
        if isinstance(fields, dict) and type(fields.get("id")) in (str, int):
            id, prompt, images = fields["id"], fields.get("prompt"), fields.get("images", [])
            files = isinstance(images, list) and all(isinstance(image, str) and image != "-" for image in images)
            if isinstance(prompt, str) and files and fields.keys() <= {"id", "prompt", "images"}:
                return Question(id, prompt, images)
        raise ValueError('expected {"id": text or whole number, "prompt": text, "images": [files]} and nothing else')
    except (ValueError, RecursionError) as error:
        return Question(id, error=f"line {number}: {reason(error)}")


def read_questions(file: Path) -> list[Question]:
    """All lines but blank ones. Raises ValueError for an id that two of them have."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file, expected questions")
    lines = enumerate(file.read_bytes().split(b"\n"), start=1)
    questions = {number: parse_question(line, number) for number, line in lines if line.strip()}
    first: dict[str | int | None, int] = {}
    for number, question in questions.items():
        if first.setdefault(question.id, number) != number and question.id is not None:
            raise ValueError(f"{file}: lines {first[question.id]} and {number} have the same id {question.id!r:.80}")
    if not questions:
        raise ValueError(f"{file}: holds no questions")
    return list(questions.values())


def read_records(files: Sequence[Path], questions: Sequence[Question]) -> dict[str | int, dict]:
    """Answers and errors by id, of two an answer. A last line that was cut does not count.

    Raises ValueError for any other line, and for an answer to none of the questions.
    """
    asked, found = {question.id for question in questions}, {}
    for file in files:
        *lines, cut = file.read_bytes().split(b"\n")
        lines += [] if cut.startswith(b'{"id": '[: len(cut)]) else [cut]  # of a file that is something else
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if not ("error" in record or "answer" in record and record["id"] in asked):
                    raise ValueError
                if "answer" not in found.get(record["id"], {}):
                    found[record["id"]] = record
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                expected = "expected answers to these questions, or a new file"
                raise ValueError(f"{file}: line {number} answers none of the questions, {expected}") from None
    return found


def write_lines(file: TextIO, records: Sequence[dict]) -> None:
    file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    file.flush()


def join_parts(answers: Path, questions: Sequence[Question], ended: bool) -> str:
    """Move what the parts hold to `answers`, in the order of the questions; errors only once all have `ended`.

    Returns: how many there are.
    """
    name = re.compile(re.escape(answers.name) + r"\.part-\d+")
    parts = [file for file in answers.parent.iterdir() if name.fullmatch(file.name)]
    found, records = read_records([*filter(Path.exists, [answers]), *parts], questions), []
    for question in questions:
        record = found.get(question.id, {})
        if "answer" not in record and question.error:
            record = {"id": question.id, "error": question.error}
        if ended and not record:
            raise ValueError(f"{answers}: answers are missing, start again; several machines need one file system")
        if ended or "answer" in record:
            records.append(record)
    if records or answers.exists():
        whole = answers.with_name(f"{answers.name}.new")
        with open(whole, "w", **LINES) as file:
            write_lines(file, records)
            os.fsync(file.fileno())
        whole.replace(answers)
    for part in parts:
        part.unlink()
    errors = sum("error" in record for record in records)
    return f"{len(records) - errors} of {len(questions)} questions answered" + f", {errors} errors" * (errors > 0)


# ------------------------------------------------------------------------------------------- batches


def estimate_tokens(question: Question, processor: Processor) -> float:
    """About the length of the prompt. Of a picture only the size is read, and only where tokens depend on it."""
    tokens, side = len(question.prompt) / 4, processor.pixels.side
    for image in question.images:
        size = side, side
        if processor.is_vl2 and os.path.isfile(image):  # not an address
            with suppress(Exception), Image.open(image) as opened:  # nor what is no picture
                size = opened.size
        tokens += processor.image_tokens(size, tiled=len(question.images) <= 2)
    return tokens


def ask(model: DeepseekVL, processor: Processor, questions: Sequence[Question], max_new_tokens: int) -> list[dict]:
    """The record of each question: asked together, or in halves where one would spoil the answers of others."""
    try:
        batch = processor([[{"role": "user", "content": q.prompt, "images": q.images}] for q in questions])
        # All answers end where the longest row fills the context.
        if len(questions) == 1 or batch["input_ids"].shape[1] + max_new_tokens <= processor.max_positions + 1:
            records = []
            for question, ids in zip(questions, generate(model, batch, max_new_tokens)):
                text = TextStream(processor.tokenizer)
                answer = "".join(map(text.push, ids)) + text.finish()
                cut = {} if ids[-1] in model.config.end_token_ids else {"cut": True}
                records.append({"id": question.id, "answer": answer.strip()} | cut)
            return records
    except (ValueError, OSError) as error:
        if len(questions) == 1:
            return [{"id": questions[0].id, "error": reason(error)}]
    halves = questions[: len(questions) // 2], questions[len(questions) // 2 :]
    return [record for half in halves for record in ask(model, processor, half, max_new_tokens)]


# ------------------------------------------------------------------------------------------- processes

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def agree(value: object = None) -> object:
    """Wait until all processes are here. Returns what rank 0 gave."""
    values = [value]
    if WORLD > 1:
        try:
            dist.broadcast_object_list(values)
            dist.barrier()
        except RuntimeError:
            raise ValueError("stopped, since another process has ended") from None
    return values[0]


def pick_own_device(name: str) -> torch.device:
    """What `pick_device` does; of several GPUs, each process of a machine takes its own."""
    device, index = pick_device(name), int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        if index >= torch.cuda.device_count():
            raise ValueError(f"no GPU for process {index} of this machine, which has {torch.cuda.device_count()}")
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    return device


def run(args: Namespace) -> None:
    check_options(max_new_tokens=args.max_new_tokens)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: expected at least 1")
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # how long the first may wait for the last
    if RANK > 0:
        agree()  # rank 0 checks all files first
    questions, answers = read_questions(args.questions), args.answers.resolve()
    usable = answers.is_file() or answers.parent.is_dir() and not answers.exists()
    if not usable or answers == args.questions.resolve():
        raise ValueError(f"{args.answers}: expected the name of a file for the answers, in a folder that is there")
    processor = Processor(args.model)
    if RANK == 0:
        so_far = join_parts(answers, questions, ended=False)
        if answers.exists():
            tell(f"{so_far} before, in {args.answers}")
        agree()
    found = read_records([*filter(Path.exists, [answers])], questions)
    left = [question for question in questions if question.id not in found and not question.error]
    left.sort(key=lambda question: estimate_tokens(question, processor), reverse=True)  # most memory first
    device = pick_own_device(args.device)
    dtype = agree(pick_dtype(args.dtype, device))  # a race of dtypes, which need not end alike everywhere
    if share := left[RANK::WORLD]:
        answer_all(args, processor, device, dtype, share, answers.with_name(f"{answers.name}.part-{RANK}"))
    agree()
    if RANK == 0:
        so_far = join_parts(answers, questions, ended=True)
        tell(f"{so_far} in {args.answers}")


def answer_all(
    args: Namespace, processor: Processor, device: torch.device, dtype: torch.dtype, share: list[Question], part: Path
) -> None:
    """Load the model, ask all of this process's share, and append to its part."""
    model = load_model(
        args.model, dtype=dtype, device=device, quantize=args.quantize, pack=True, tokenizer=processor.tokenizer,
        progress=lambda read: note(f"{read:.0%} of {args.model} loaded", quiet=RANK > 0),
    )  # fmt: skip
    start, done = time.perf_counter(), 0
    with open(part, "a", **LINES) as file:
        while batch := share[done : done + args.batch_size]:
            write_lines(file, ask(model, processor, batch, args.max_new_tokens))
            done += len(batch)
            rate = done / (time.perf_counter() - start)
            left = timedelta(seconds=round((len(share) - done) / rate))
            note(f"{left} left, {done} of {len(share)}, {60 * rate:.1f} a minute", quiet=RANK > 0)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("questions", type=Path, metavar="QUESTIONS", help='lines of {"id": ..., "prompt": ..., "images": [FILE, ...]}')
    add("answers", type=Path, metavar="ANSWERS", help='lines of {"id": ..., "answer": ...}, or "error" in its place')
    add("--model", type=Path, default=DEMO, metavar="DIR", help="checkpoint folder (default: demo/checkpoint)")
    add("--batch-size", type=int, default=8, metavar="N", help="questions asked together (default: %(default)s)")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of what is not quantized")
    add("--quantize", choices=("int8", "int4"), help="round decoder and head to 8 or 4 bits")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="of several GPUs each process has one")
    with told("stopped; the same command goes on from here"):
        try:
            run(parser.parse_args(arguments))
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            raise ValueError(f"process {RANK}: {reason(error)}" if WORLD > 1 else reason(error)) from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()  # its threads would abort a process that exits


if __name__ == "__main__":
    main()
