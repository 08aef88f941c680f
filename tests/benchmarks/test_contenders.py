"""Who is measured on what."""

from pathlib import Path

import pytest

from benchmarks.contenders import OURS, contenders
from benchmarks.environments import LLAMA_CPP
from benchmarks.models import MODELS


@pytest.mark.parametrize("size", ["4", "32", "small"])
@pytest.mark.parametrize("format_", ["bf16", "int4"])
@pytest.mark.parametrize("capped", [True, False])
def test_ours_is_first_and_llama_cpp_always_there(format_: str, size: str, *, capped: bool) -> None:
    ours, *peers = contenders(format_, size, capped=capped)
    assert (ours.name, ours.is_ours) == (OURS, True)
    assert any(peer.environment is LLAMA_CPP for peer in peers)
    names = [peer.name for peer in peers]
    assert len(set(names)) == len(names)
    if (format_, size) == ("bf16", "4"):
        assert ("deepspeed" in names) == capped
        assert "accelerate" in names
        assert {peer.model for peer in peers} <= MODELS.keys()


def test_a_cap_reaches_those_who_place_weights_themselves() -> None:
    by_name = {one.name: one for one in contenders("bf16", "4", capped=True)}
    scratch = Path("/scratch")
    assert by_name[OURS].options(6 * 10**9, scratch) == {"memory_bytes": 6 * 10**9}
    placed = by_name["accelerate"].options(6 * 10**9, scratch)
    assert placed == {"memory_bytes": 3_700_000_000, "offload_folder": "/scratch"}
    assert by_name["accelerate"].fills_scratch
    assert not by_name["llama.cpp"].fills_scratch


def test_4_bit_weights_are_repacked_only_where_they_fit_twice() -> None:
    capped = contenders("int4", "4", capped=True)[1].options(10**9, Path("/scratch"))
    fitting = contenders("int4", "4", capped=False)[1].options(None, Path("/scratch"))
    assert (capped["repack"], fitting["repack"]) == (False, True)
