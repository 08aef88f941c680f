"""moe_server.v1.ModelService: what is served.

Answers as soon as the checkpoints have been read, mostly before the port opens.
"""

from moe_server.proto.moe_server.v1 import model_pb2 as pb
from moe_server.service.registration import Context
from moe_server.service.registry import Registry
from moe_server.service.served_model import ServedModel

SERVICE = pb.DESCRIPTOR.services_by_name["ModelService"]


class ModelService:
    """The servicer."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ListModels(  # noqa: N802  # named by the protocol
        self, _request: pb.ListModelsRequest, _context: Context
    ) -> pb.ListModelsResponse:
        """All, the first one first."""
        self._registry.refuse_unread()
        models = [_facts(running.model) for running in self._registry]
        return pb.ListModelsResponse(models=models)

    async def GetModel(  # noqa: N802  # named by the protocol
        self, request: pb.GetModelRequest, _context: Context
    ) -> pb.GetModelResponse:
        """One by name."""
        running = self._registry.find(request.name)
        return pb.GetModelResponse(model=_facts(running.model))


def _facts(model: ServedModel) -> pb.Model:
    return pb.Model(
        name=model.name,
        architecture=model.architecture,
        dtype=model.dtype,
        vocab_size=model.vocab_size,
        max_context_tokens=model.max_request_tokens,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        num_experts_per_token=model.num_experts_per_token,
        num_parameters=model.num_parameters,
        has_tokenizer=model.tokenizer is not None,
        num_active_parameters=model.num_active_parameters,
        accepts_messages=model.chat is not None,
    )
