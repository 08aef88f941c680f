"""moe_server.v1.ModelService: what is served.

Answers in every state: the checkpoint is read before the port opens.
"""

from moe_server.proto.moe_server.v1 import model_pb2 as pb
from moe_server.service.registration import Context
from moe_server.service.served_model import ServedModel
from moe_server.service.validation import check_model

SERVICE = pb.DESCRIPTOR.services_by_name["ModelService"]


class ModelService:
    """The servicer."""

    def __init__(self, model: ServedModel) -> None:
        self._model = pb.Model(
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
        self._served = model

    async def ListModels(  # noqa: N802  # named by the protocol
        self, _request: pb.ListModelsRequest, _context: Context
    ) -> pb.ListModelsResponse:
        """All one of them."""
        return pb.ListModelsResponse(models=[self._model])

    async def GetModel(  # noqa: N802  # named by the protocol
        self, request: pb.GetModelRequest, _context: Context
    ) -> pb.GetModelResponse:
        """One by name."""
        check_model(request.name, self._served)
        return pb.GetModelResponse(model=self._model)
