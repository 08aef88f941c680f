"""moe_server.v1.TokenizerService: what prompts become, and what token ids say."""

from moe_server.errors import MoeServerError, Reason
from moe_server.proto.moe_server.v1 import generation_pb2 as pb
from moe_server.service.registration import Context
from moe_server.service.registry import Registry

SERVICE = pb.DESCRIPTOR.services_by_name["TokenizerService"]


MAX_AT_ONCE = 64
"""Calls that are worked on or wait: they take no place of a request; nothing else bounds them."""


class TokenizerService:
    """The servicer. Its long prompts wait for one another, and generation for none of them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._num_open = 0

    async def Tokenize(  # noqa: N802  # named by the protocol
        self, request: pb.TokenizeRequest, _context: Context
    ) -> pb.TokenizeResponse:
        """A prompt's ids."""
        prompts = self._registry.find(request.model).prompts_to_show
        if self._num_open >= MAX_AT_ONCE:
            raise MoeServerError(
                f"{MAX_AT_ONCE} calls of Tokenize are open, which is the bound.",
                "Try again later.",
                reason=Reason.EXHAUSTED,
            )
        self._num_open += 1
        try:
            return pb.TokenizeResponse(token_ids=await prompts.encode(request))
        finally:
            self._num_open -= 1

    async def Detokenize(  # noqa: N802  # named by the protocol
        self, request: pb.DetokenizeRequest, _context: Context
    ) -> pb.DetokenizeResponse:
        """The ids' text."""
        model = self._registry.find(request.model).model
        if model.tokenizer is None:
            raise MoeServerError(
                f"Model {model.name!r} has no tokenizer, so its token ids have no text.",
                "Serve a checkpoint with tokenizer.model or tokenizer.json.",
                reason=Reason.UNSUPPORTED,
            )
        num_tokens = len(request.token_ids)
        if num_tokens > model.max_request_tokens:
            raise MoeServerError(
                f"There are {num_tokens} token ids; at most {model.max_request_tokens}.",
                field="token_ids",
            )
        return pb.DetokenizeResponse(text=model.tokenizer.decode(request.token_ids))
