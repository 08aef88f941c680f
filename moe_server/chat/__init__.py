"""Conversations to token ids, as the checkpoint's makers meant them.

`chat.py` finds out which way a checkpoint goes: its own template (`template_chat.py`, with
`typed_text.py` so that what users type never becomes a special token) or mistral-common's encoding
(`mistral_v1.py`). Knows no requests; imports the tokenizer, `json_file` and `errors`, and neither
torch nor transformers. `service/prompts.py` calls it.
"""
