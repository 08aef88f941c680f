"""The facts about the served model that the services answer with and validate against.

Gathered once, when the checkpoint has been read. Knows no gRPC.
"""

from dataclasses import dataclass

import msgspec

from moe_server.budget import MemoryPlan
from moe_server.chat.chat import Chat
from moe_server.checkpoint import Checkpoint
from moe_server.config import ModelConfig
from moe_server.messages import Vocabulary
from moe_server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One checkpoint as clients see it."""

    name: str
    architecture: str
    dtype: str
    vocab_size: int
    num_layers: int
    num_experts: int
    num_experts_per_token: int
    num_parameters: int
    num_active_parameters: int
    eos_token_ids: tuple[int, ...]
    max_request_tokens: int
    """Most tokens of prompt and completion together."""
    default_max_new_tokens: int
    tokenizer: Tokenizer | None
    chat: "Chat | None"
    """How conversations become token ids; None where the checkpoint does not say."""
    memory: MemoryPlan

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        checkpoint: Checkpoint,
        memory: MemoryPlan,
        tokenizer: Tokenizer | None,
        chat: "Chat | None" = None,
    ) -> "ServedModel":
        """Picks the facts together."""
        return cls(
            name=config.served_name,
            architecture=checkpoint.architecture,
            dtype=checkpoint.dtype,
            vocab_size=checkpoint.vocab_size,
            num_layers=checkpoint.num_layers,
            num_experts=checkpoint.num_experts,
            num_experts_per_token=checkpoint.num_experts_per_token,
            num_parameters=checkpoint.num_parameters,
            num_active_parameters=checkpoint.num_active_parameters,
            eos_token_ids=checkpoint.eos_token_ids,
            max_request_tokens=memory.max_request_tokens,
            default_max_new_tokens=config.scheduler.default_max_new_tokens,
            tokenizer=tokenizer,
            chat=chat,
            memory=memory,
        )

    @property
    def vocabulary(self) -> Vocabulary | None:
        """What constraints are made of; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return Vocabulary(
            tokens=msgspec.msgpack.encode(self.tokenizer.token_bytes),
            vocab_size=self.vocab_size,
            eos_token_ids=list(self.eos_token_ids),
        )
