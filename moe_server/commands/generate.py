"""`moe-server generate`: a completion in the terminal, and where its time and bytes went."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click
from google.protobuf.duration_pb2 import Duration

from moe_server.client import Client, Messages, RetryableError, UnreachableError
from moe_server.commands.finite import POSITIVE_SECONDS
from moe_server.commands.format import format_bytes, format_seconds, print_table
from moe_server.commands.text import checked
from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import generation_pb2 as pb

TOKEN_ID = click.IntRange(0, 2**32 - 1)


@dataclass(slots=True)
class SampleOutput:
    """One completion of the prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.Logprob] = field(default_factory=list)
    finished: pb.Finished = field(default_factory=pb.Finished)

    @property
    def finish_reason(self) -> str:
        return pb.FinishReason.Name(self.finished.reason).removeprefix("FINISH_REASON_").lower()


@dataclass(slots=True)
class Completion:
    """What came back, and when. Times are `time.perf_counter()` seconds."""

    sent: float = field(default_factory=time.perf_counter)
    first: float | None = None
    """When the first token arrived."""
    last: float | None = None
    started: pb.Started = field(default_factory=pb.Started)
    samples: list[SampleOutput] = field(default_factory=list)

    def take(self, event: pb.GenerateStreamResponse) -> None:
        """Adds one event of the stream."""
        match event.WhichOneof("event"):
            case "started":
                self.started = event.started
            case "delta":
                self.last = time.perf_counter()
                self.first = self.first or self.last
                sample = self._sample(event.delta.index)
                sample.text += event.delta.text
                sample.token_ids += event.delta.token_ids
                sample.logprobs += event.delta.logprobs
            case _:
                self._sample(event.finished.index).finished = event.finished

    def _sample(self, index: int) -> SampleOutput:
        while len(self.samples) <= index:
            self.samples.append(SampleOutput())
        return self.samples[index]

    @property
    def num_new_tokens(self) -> int:
        return sum(sample.finished.usage.completion_tokens for sample in self.samples)

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token."""
        return self.first - self.sent if self.first else None

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token, of all samples."""
        if self.first is None or self.last is None or self.last <= self.first:
            return None
        return (self.num_new_tokens - 1) / (self.last - self.first)


@click.command(
    epilog="Example: moe-server generate 'Once upon a time' --max-new-tokens 40 --temperature 0.7"
)
@click.argument("text", required=False)
@click.option("--target", default="127.0.0.1:50051", show_default=True, metavar="HOST:PORT")
@click.option("--model", default="", metavar="NAME", help="Default: the server's first.")
@click.option("--token-ids", metavar="1,2,3", help="The prompt as token ids, instead of TEXT.")
@click.option("--chat", metavar="TEXT", help="Instead of TEXT: a user's message, answered.")
@click.option("--system", metavar="TEXT", help="With --chat: the message that goes before it.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Default: the server's.")
@click.option("--temperature", type=float, help="0 or absent: greedy.")
@click.option("--top-k", type=click.IntRange(0, 2**32 - 1), help="Keep the k most likely tokens.")
@click.option("--top-p", type=float, help="Keep the smallest set of this probability.")
@click.option("--min-p", type=float, help="Drop tokens less likely than this times the best.")
@click.option("--repetition-penalty", type=float, help="Of tokens in prompt and completion.")
@click.option("--presence-penalty", type=float, help="Of tokens in the completion.")
@click.option("--frequency-penalty", type=float, help="The same, for each time they occur.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Absent: the server draws one.")
@click.option("--samples", "num_samples", type=click.IntRange(min=1), help="Completions of TEXT.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@click.option("--stop-token", multiple=True, type=TOKEN_ID, help="End after it; repeatable.")
@click.option("--json-schema", metavar="JSON|@FILE", help="Complete with a document of it.")
@click.option("--regex", metavar="REGEX", help="Complete with a text that matches.")
@click.option("--grammar", metavar="LARK|@FILE", help="Complete with a text of this grammar.")
@click.option("--choice", multiple=True, metavar="TEXT", help="Complete with one; repeatable.")
@click.option("--logprobs", is_flag=True, help="With --json: of each token.")
@click.option("--top-logprobs", type=click.IntRange(0, 20), help="With --json: and the best n.")
@click.option("--ignore-eos", is_flag=True, help="Continue past the end-of-sequence token.")
@click.option("--priority", type=click.IntRange(-10, 10), default=0, help="Higher goes first.")
@click.option("--timeout", type=POSITIVE_SECONDS, metavar="SECONDS", help="The request's deadline.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a stream.")
def generate(  # click passes keywords
    text: str | None,
    target: str,
    model: str,
    token_ids: str | None,
    chat: str | None,
    system: str | None,
    max_new_tokens: int | None,
    stop: tuple[str, ...],
    stop_token: tuple[int, ...],
    json_schema: str | None,
    regex: str | None,
    grammar: str | None,
    choice: tuple[str, ...],
    top_logprobs: int | None,
    priority: int,
    timeout: float | None,
    *,
    logprobs: bool,
    ignore_eos: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Complete TEXT, streaming to stdout; then say on stderr where time and bytes went.

    Several samples are printed one after the other at the end. Without a TEXT that the served
    checkpoint could tokenise, give --token-ids; token ids are then printed. --chat asks the model
    as the checkpoint's chat template says. Ctrl-C cancels the request.
    """
    prompt = _prompt(text, token_ids, chat, system)
    prints_text = token_ids is None
    is_several = (sampling["num_samples"] or 1) > 1
    completion = Completion()
    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal that cannot show a character gets a question mark, not the end of the stream.
        sys.stdout.reconfigure(errors="replace")
    with Client(target) as client, _deadline_told(timeout, completion):
        for event in client.generate_stream(
            prompt,
            model=model,
            sampling=pb.Sampling(**sampling),
            stopping=pb.Stopping(
                max_new_tokens=max_new_tokens,
                stop_sequences=[checked(one, "--stop") for one in stop],
                stop_token_ids=stop_token,
                ignore_eos=ignore_eos,
            ),
            output=pb.Output(logprobs=logprobs, top_logprobs=top_logprobs),
            json_schema=_text_or_file(json_schema, "--json-schema"),
            regex=None if regex is None else checked(regex, "--regex"),
            grammar=_text_or_file(grammar, "--grammar"),
            choices=[checked(one, "--choice") for one in choice] or None,
            priority=priority,
            timeout_s=timeout,
        ):
            completion.take(event)
            if not as_json and not is_several and event.HasField("delta"):
                ids = " ".join(map(str, event.delta.token_ids))
                sys.stdout.write(event.delta.text if prints_text else f"{ids} ")
                sys.stdout.flush()
    if as_json:
        click.echo(json.dumps(_as_json(completion)))
        return
    if is_several:
        for index, sample in enumerate(completion.samples):
            shown = sample.text if prints_text else " ".join(map(str, sample.token_ids))
            click.echo(f"[{index}] {shown}")
    else:
        click.echo()
    print_table(_rows(completion))


def _prompt(
    text: str | None, token_ids: str | None, chat: str | None, system: str | None
) -> str | list[int] | Messages:
    if sum(given is not None for given in (text, token_ids, chat)) != 1:
        raise MoeServerError("Give one of TEXT, --token-ids and --chat.")
    if system is not None and chat is None:
        raise MoeServerError("--system goes with --chat.")
    if token_ids is not None:
        return _parse_ids(token_ids)
    if text is not None:
        return checked(text, "TEXT")
    messages = (
        [] if system is None else [{"role": "system", "content": checked(system, "--system")}]
    )
    return [*messages, {"role": "user", "content": checked(chat or "", "--chat")}]


@contextmanager
def _deadline_told(timeout: float | None, completion: Completion) -> Iterator[None]:
    """A deadline that passed before the server said anything is not a server that is not there."""
    try:
        yield
    except UnreachableError:
        if timeout is None or time.perf_counter() - completion.sent < timeout:
            raise
        raise RetryableError(
            f"The deadline of {timeout:g} s passed before an answer came.",
            "Give it more time with --timeout.",
            reason=Reason.EXPIRED,
        ) from None


def _text_or_file(value: str | None, option: str) -> str | None:
    """The value itself, or what is in the file that it names after an @."""
    if value is None:
        return None
    if not value.startswith("@"):
        return checked(value, option)
    path = Path(value[1:])
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoeServerError(f"Cannot read {path} for {option}: {error}.") from None


def _parse_ids(text: str) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        ids = [-1]
    if not all(0 <= token_id < 2**32 for token_id in ids):
        raise MoeServerError(f"--token-ids {text!r} is not a list of token ids like 1,2,3.")
    return ids


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9


def _rows(completion: Completion) -> list[tuple[str, str]]:
    finished = completion.samples[0].finished
    usage, timings = finished.usage, finished.timings
    rate = completion.tokens_per_second
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    return [
        ("finished", ", ".join(sample.finish_reason for sample in completion.samples)),
        ("tokens", f"{usage.prompt_tokens} prompt{cached} + {completion.num_new_tokens} new"),
        ("time to first token", format_seconds(completion.ttft_s)),
        ("tokens/s after it", f"{rate:.2f}" if rate else "-"),
        ("queue", format_seconds(_seconds(timings.queue))),
        ("prefill", format_seconds(_seconds(timings.prefill))),
        ("decode", format_seconds(_seconds(timings.decode))),
        ("  of both: router", format_seconds(_seconds(timings.router))),
        ("  expert transfer", _moved(timings.expert_transfer, timings.expert_transfer_bytes)),
        ("  expert read", _moved(timings.expert_read, timings.expert_read_bytes)),
    ]


def _moved(took: Duration, num_bytes: int) -> str:
    return f"{format_seconds(_seconds(took))}  {format_bytes(num_bytes)}"


def _as_json(completion: Completion) -> dict[str, Any]:
    first, *others = completion.samples
    usage, timings = first.finished.usage, first.finished.timings
    seconds = {
        f"{name}_s": _seconds(getattr(timings, name))
        for name in ("queue", "prefill", "decode", "router", "expert_transfer", "expert_read")
    }
    byte_counts = {
        "expert_transfer_bytes": timings.expert_transfer_bytes,
        "expert_read_bytes": timings.expert_read_bytes,
    }
    answer = {
        "request_id": completion.started.request_id,
        "model": completion.started.model,
        "seed": completion.started.seed,
        **_sample_as_json(first),
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "ttft_s": completion.ttft_s,
        "tokens_per_second": completion.tokens_per_second,
        "timings": {**seconds, **byte_counts},
    }
    if others:
        answer["further_samples"] = [_sample_as_json(sample) for sample in others]
    return answer


def _sample_as_json(sample: SampleOutput) -> dict[str, Any]:
    answer = {
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "completion_tokens": sample.finished.usage.completion_tokens,
    }
    if sample.logprobs:
        answer["logprobs"] = [
            {
                "token_id": entry.token_id,
                "logprob": entry.logprob,
                "top": [{"token_id": top.token_id, "logprob": top.logprob} for top in entry.top],
            }
            for entry in sample.logprobs
        ]
    return answer
