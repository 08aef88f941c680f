"""transformers with accelerate's disk offload as a peer.

Layers that fit the cap are kept in memory; accelerate maps the others from files, so that only the
pages of experts that are used are read.
"""

from collections.abc import Iterator

import torch
import transformers
from session import Prompts, serve, session


def main() -> None:
    """Loads the model as the session says and serves its works."""
    job = session()
    options = job["options"]
    torch.set_num_threads(job["threads"])
    placing = {}
    if options["memory_bytes"] is not None:
        placing = {
            "device_map": "auto",
            "max_memory": {"cpu": options["memory_bytes"]},
            "offload_folder": options["offload_folder"],
        }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16, **placing
    ).eval()

    @torch.inference_mode()
    def generate(prompts: Prompts, new_tokens: int) -> Iterator[list[int]]:
        cache = None
        ids = torch.tensor(prompts)  # prompts of one work have one length
        for _ in range(new_tokens):
            done = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = done.past_key_values, done.logits[:, -1].argmax(-1, keepdim=True)
            yield ids[:, 0].tolist()

    facts = {"version": transformers.__version__}
    if options["memory_bytes"] is not None:
        facts["device_map"] = {name: str(place) for name, place in model.hf_device_map.items()}
    serve(generate, [job["prompt"]], facts)


if __name__ == "__main__":
    main()
