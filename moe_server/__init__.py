"""moe-server: a gRPC inference server for mixture-of-experts models that do not fit on the GPU.

Two processes: the front door (`cli`, `service/`, `supervisor`, `tokenizer`) speaks gRPC and never
imports torch; the engine process (`engine_process`, `engine`, `model`, ...) runs the model.
`moe_server.kernels`, `.offload`, `.warmup` and `.proto` are the repository's top-level folders of
those names, reached by links: top-level packages called `kernels` or `proto` would shadow others'.
docs/architecture.md walks a prompt and an expert through all of it.
"""

__version__ = "0.1.0"
