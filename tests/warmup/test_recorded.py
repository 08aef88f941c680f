import pytest

from moe_server.errors import MoeServerError
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.warmup.recorded import MAX_NEW_TOKENS, of_model, read_requests, to_line


def with_text(text: str, model: str = "demo", max_new_tokens: int = 9) -> pb.RecordedRequest:
    stopping = pb.Stopping(max_new_tokens=max_new_tokens)
    request = pb.GenerateStreamRequest(model=model, text=text, stopping=stopping)
    return pb.RecordedRequest(request=request)


def redacted(tokens: int, seed: int = 7) -> pb.RecordedRequest:
    prompt = pb.RandomPrompt(tokens=tokens, seed=seed)
    return pb.RecordedRequest(request=pb.GenerateStreamRequest(model="demo"), random_prompt=prompt)


def test_what_is_written_is_read(tmp_path):
    recorded = [with_text("Zwölf\nBoxkämpfer \u2028"), redacted(12)]
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(f"{to_line(one)}\n" for one in recorded), encoding="utf-8")
    assert read_requests(file) == recorded


def test_each_model_gets_its_own_and_lengths_are_cut():
    recorded = [with_text("a"), with_text("b", "other"), with_text("c", "", 10**6), redacted(5)]
    first, third, random = of_model(recorded, "demo", 3, 100)
    assert (first.text, first.stopping.max_new_tokens) == ("a", 9)
    assert (third.text, third.stopping.max_new_tokens) == ("c", MAX_NEW_TOKENS)
    assert len(random.token_ids.ids) == 5
    assert set(random.token_ids.ids) <= {0, 1, 2}
    [seven], [eight] = ([redacted(5, seed)] for seed in (7, 8))
    assert of_model([seven], "demo", 10**6, 100) != of_model([eight], "demo", 10**6, 100)
    assert of_model([seven], "demo", 10**6, 100) == of_model([redacted(5)], "demo", 10**6, 100)


def test_a_length_beyond_any_takes_no_memory_and_stays_too_long():
    [request] = of_model([redacted(2**31 - 1)], "demo", 3, 100)
    assert len(request.token_ids.ids) == 101


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"not JSON\n", "line 1 is no recorded request"),
        (to_line(redacted(1)).encode() + b'\n\n{"unknown": 1}', "line 3 is no recorded request"),
        (b'{"request": {"model": "demo"}}', "one of prompt and random_prompt"),
        (b'{"request": {"text": "a"}, "random_prompt": {"tokens": 1}}', "one of prompt and"),
        (b"\xff", "utf-8"),
        (b"\n", "it has no requests"),
        (b"\n".join([to_line(redacted(1)).encode()] * 1001), "1001 requests"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_line(tmp_path, content, problem):
    file = tmp_path / "requests.jsonl"
    file.write_bytes(content)
    with pytest.raises(MoeServerError, match=problem) as caught:
        read_requests(file)
    assert caught.value.field == "warmup.requests"
    assert ".." not in caught.value.message


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MoeServerError, match="No such file"):
        read_requests(tmp_path / "none")
