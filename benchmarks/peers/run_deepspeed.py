"""DeepSpeed ZeRO-3 with parameters on NVMe as a peer.

It gathers whole layers, all experts of them, and writes the model to its swap folder at each start.
With `build` as its argument it compiles what it would otherwise compile in its first run: a run
that is ended while it does so leaves a lock behind that all later ones wait for.
"""

import os
import shutil
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"
os.environ["TORCH_EXTENSIONS_DIR"] = f"{sys.prefix}/extensions"
os.environ["PATH"] = f"{sys.prefix}/bin:{os.environ['PATH']}"  # ninja

from collections.abc import Iterator

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from session import Prompts, serve, session
from transformers.integrations import HfDeepSpeedConfig


def main() -> None:
    """Loads the model as the session says and serves its works."""
    job = session()
    options = job["options"]
    torch.set_num_threads(job["threads"])
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # one process: no JIT build
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {
                "device": "nvme",
                "nvme_path": options["offload_folder"],
                "buffer_count": 6,
                "buffer_size": options["buffer_elements"],
                "max_in_cpu": 0,
            },
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": options["buffer_elements"],
            "stage3_prefetch_bucket_size": 0,
        },
        "aio": {"block_size": 2**20, "queue_depth": 16, "thread_count": 2},
        "memory_efficient_linear": False,
    }
    keep = HfDeepSpeedConfig(settings)  # from_pretrained looks for it  # noqa: F841
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    engine = deepspeed.initialize(model=model.eval(), config=settings, dist_init_required=False)[0]
    engine.eval()

    @torch.inference_mode()
    def generate(prompts: Prompts, new_tokens: int) -> Iterator[list[int]]:
        cache = None
        ids = torch.tensor(prompts)
        for _ in range(new_tokens):
            done = engine(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = done.past_key_values, done.logits[:, -1].argmax(-1, keepdim=True)
            yield ids[:, 0].tolist()

    serve(generate, [job["prompt"]], {"version": deepspeed.__version__})


def build() -> None:
    """Compiles DeepSpeed's operators for reading from disk."""
    shutil.rmtree(os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)
    get_accelerator().create_op_builder("AsyncIOBuilder").load()


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build()
    else:
        main()
