"""llama.cpp as a peer, through llama-cpp-python's low-level interface.

Its disk offload is mmap: the kernel pages weights in and out. All sequences of a step are in one
`llama_decode`, and `n_ubatch` holds it whole, so a batch of 8 reads an expert once.
"""

import ctypes
from collections.abc import Iterator

import llama_cpp
import numpy as np
from session import Prompts, serve, session

MAX_SEQUENCES = 8
MAX_BATCH_TOKENS = 512


def main() -> None:
    """Loads the model as the session says and serves its works."""
    job = session()
    options = job["options"]
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.load_mode = getattr(llama_cpp, "LLAMA_LOAD_MODE_" + options["load_mode"])
    model_params.use_extra_bufts = options["repack"]
    model = llama_cpp.llama_model_load_from_file(job["model"].encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = job["max_total_tokens"]
    params.n_batch = params.n_ubatch = MAX_BATCH_TOKENS
    params.n_seq_max = MAX_SEQUENCES
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = job["threads"]
    params.no_perf = True
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp could not make a context")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Runs (token, position, sequence, wants logits) rows; the best next token of each."""
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        if code := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode failed with code {code}")
        wanted_rows = [index for index, row in enumerate(rows) if row[3]]
        return [_best(llama_cpp.llama_get_logits_ith(context, i), vocab_size) for i in wanted_rows]

    def generate(prompts: Prompts, new_tokens: int) -> Iterator[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = decode(
            [
                (token, position, sequence, position == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
        )
        yield tokens
        for step in range(new_tokens - 1):
            tokens = decode(
                [
                    (token, len(prompts[sequence]) + step, sequence, True)
                    for sequence, token in enumerate(tokens)
                ]
            )
            yield tokens

    serve(generate, [job["prompt"]], {"version": llama_cpp.__version__, **options})


def _best(logits: "ctypes._Pointer[ctypes.c_float]", vocab_size: int) -> int:
    return int(np.argmax(np.ctypeslib.as_array(logits, (vocab_size,))))


if __name__ == "__main__":
    main()
